"""Labs and predictions, driven as a hand would drive them, without a browser."""

import gc
import re
import subprocess
import sys
import threading
import weakref

import ipywidgets
import pytest
import torch
import traitlets

from sft_edu import (
    RULES,
    TinyLM,
    Trace,
    accumulate,
    closed_form,
    compare,
    full_batch_gradient,
    sft_microbatch_train_step,
    split_minibatch,
)
from sft_edu.digits import fixed
from sft_edu.masks import PRESETS
from sft_edu.ragged import ragged_minibatch
from sft_edu.widgets import (
    AccumulationLab,
    Bars,
    MaskLab,
    Prediction,
    SavePicture,
    ScalingLab,
    StageChain,
    StepLab,
    TokenMask,
    show_step,
)

MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])


def find(widget, kind):
    """All widgets of a kind below a widget."""
    children = [found for child in getattr(widget, "children", ()) for found in find(child, kind)]
    return ([widget] if isinstance(widget, kind) else []) + children


def expected_gradient(lab):
    mask = torch.tensor(lab.mask)
    denominator = closed_form.denominator(
        lab.rule,
        mask,
        lab.gradient_accumulation_steps,
        lab.normalize_constant,
        max(int(mask.sum()), 1) * lab.gradient_accumulation_steps,
    )
    return closed_form.grad_log_probs(mask, denominator, torch.float32)


def test_the_step_lab_opens_on_the_worked_example():
    lab = StepLab()
    assert (lab.num_tokens, round(lab.loss, 6)) == (7, 0.7)
    assert lab.gradient.equal(-0.25 * MASK)
    assert repr(lab) == (
        "StepLab: G=2 c=1 rule=notes mask=1101/1111\n"
        "num_tokens 7, masked_sum -2.8000, loss 1.4000, scaled_loss 0.7000, gradient -0.2500 where the mask\n"
        "is 1.\n"
        "Each of the 7 response tokens gets the gradient -0.2500 = -1 / (c·G²), where c·G² = 4. Every other\n"
        "token gets exactly 0."
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_slider_the_constant_and_the_rule_move_the_gradient(rule):
    lab = StepLab()
    find(lab, ipywidgets.IntSlider)[0].value = 5
    find(lab, ipywidgets.FloatText)[0].value = 2.5
    find(lab, ipywidgets.Dropdown)[0].value = rule
    assert (lab.gradient_accumulation_steps, lab.normalize_constant, lab.rule) == (5, 2.5, rule)
    torch.testing.assert_close(lab.gradient, expected_gradient(lab), rtol=1e-6, atol=0)


def test_code_moves_the_controls():
    lab = StepLab()
    lab.gradient_accumulation_steps = 7
    lab.rule = "token_mean"
    assert find(lab, ipywidgets.IntSlider)[0].value == 7
    assert find(lab, ipywidgets.Dropdown)[0].value == "token_mean"


def test_painting_changes_the_mask_and_a_mask_changes_the_tokens():
    lab = StepLab()
    tokens = find(lab, TokenMask)[0]
    tokens.mask = [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert lab.num_tokens == 8
    assert tokens.values[0][2] == -0.25
    lab.mask = torch.zeros(2, 4, dtype=torch.bool)
    assert tokens.mask == ((0, 0, 0, 0),) * 2
    assert lab.loss == 0
    assert "exactly 0" in repr(lab)


def test_what_the_views_show_is_what_the_step_computed():
    lab = StepLab()
    chain, tokens = find(lab, StageChain)[0], find(lab, TokenMask)[0]
    for steps in (1, 3, 32):
        lab.gradient_accumulation_steps = steps
        values = {stage["name"]: stage["value"] for stage in chain.stages}
        assert values["masked_sum"] == "-2.8000"
        assert values["returned_loss"] == fixed(lab.loss) == fixed(2.8 / steps**2)
        assert torch.tensor(tokens.values).equal(lab.gradient)
        assert f"where c·G² = {steps**2}" in chain.words
        assert chain.drawn == lab._drawn


def test_a_small_gradient_is_not_shown_as_zero():
    lab = StepLab(gradient_accumulation_steps=32, normalize_constant=100)
    assert "gradient -9.766e-06 = -1 / (c·G²), where c·G² = 102400" in repr(lab).replace("\n", " ")


def test_the_token_in_focus_is_taken_apart_and_its_log_prob_is_on_the_slider():
    lab = StepLab()
    chain, tokens, slider = find(lab, StageChain)[0], find(lab, TokenMask)[0], find(lab, ipywidgets.FloatSlider)[0]
    tokens.focused = (1, 2)
    assert slider.value == pytest.approx(-0.3)
    assert chain.detail == [
        "Gradient of token [1, 2], the one in focus:",
        "-1 × mask × 1/G × 1/G × 1/c = -1 × 1 × 1/2 × 1/2 × 1/1 = -0.2500, and autograd gave the same",
    ]
    slider.value = -2.3
    assert lab.log_probs[1][2] == pytest.approx(-2.3)
    assert "masked_sum -4.8000" in repr(lab)
    assert tokens.tokens[1][2] == "-2.3"
    tokens.focused = (0, 0)
    assert slider.value == pytest.approx(-0.5)
    assert lab.log_probs[1][2] == pytest.approx(-2.3)


def test_a_chosen_stage_shows_its_formula_and_its_gradient():
    lab = StepLab()
    chain = find(lab, StageChain)[0]
    chain.selected = "loss"
    assert chain.detail[1:] == ["-S / G = -(-2.8000) / 2", "its gradient, d scaled_loss / d loss: 0.5000"]
    chain.selected = "backward"
    assert chain.detail == [
        "backward, in symbols ∂ℓ/∂log p",
        "-m / (c·G²) = -m / 4",
        "Gradient of token [0, 0], the one in focus:",
        "-1 × mask × 1/G × 1/G × 1/c = -1 × 1 × 1/2 × 1/2 × 1/1 = -0.2500, and autograd gave the same",
    ]


def test_the_words_write_the_denominator_as_the_chain_does():
    lab = StepLab(gradient_accumulation_steps=5, normalize_constant=0.5)
    for rule, formula in {"notes": "(c·G²)", "token_mean": "N"}.items():
        lab.rule = rule
        backward = find(lab, StageChain)[0].stages[4]
        number = backward["numeric"].removeprefix("-m / ")
        assert backward["symbolic"] == f"-m / {formula}"
        assert f"-1 / {formula}, where {formula.strip('()')} = {number}." in lab.words()


def test_reset_brings_back_the_start():
    lab = StepLab(gradient_accumulation_steps=3)
    start = repr(lab)
    lab.gradient_accumulation_steps, lab.normalize_constant, lab.rule = 9, 4.0, "sequence_mean"
    lab.mask = 1 - MASK
    lab.log_probs = [[-1.0] * 4] * 2
    find(lab, StageChain)[0].selected = "loss"
    assert repr(lab) != start
    next(button for button in find(lab, ipywidgets.Button) if button.description == "reset").click()
    assert repr(lab) == start
    assert find(lab, StageChain)[0].selected == ""
    assert find(lab, StageChain)[0].detail[0] == "Gradient of token [0, 0], the one in focus:"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 33),
        ("gradient_accumulation_steps", 2.5),
        ("normalize_constant", 0.0),
        ("normalize_constant", float("nan")),
        ("rule", "mean"),
        ("mask", [[1, 1], [0, 1]]),
        ("mask", [[1, 1, 2, 1], [1, 1, 1, 1]]),
        ("mask", [[1, 1, 0.5, 1], [1, 1, 1, 1]]),
        ("mask", None),
        ("mask", "1101 1111"),
        ("log_probs", [[-1.0, -1.0, -1.0, 0.5]] * 2),
        ("log_probs", [[-1.0, -1.0, -1.0, float("nan")]] * 2),
        ("log_probs", None),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(name, value):
    lab = StepLab()
    before = repr(lab)
    with pytest.raises(traitlets.TraitError, match=name):
        setattr(lab, name, value)
    assert repr(lab) == before


LABS = {
    "StepLab": (StepLab, "G=5 c=2.5 rule=sequence_mean mask=1001/0110 logp=-1,-2,-3,-4/-0.5,-0.25,-7,0"),
    "MaskLab": (MaskLab, "mask=010000000000000011111/000011000000000000001"),
    "AccumulationLab": (AccumulationLab, "sequences=16 G=5 rule=microbatch_token_mean imbalance=1 played=3"),
    "ScalingLab": (ScalingLab, "G=3 imbalance=0.9 max_norm=2.5"),
}


@pytest.mark.parametrize(("kind", "text"), LABS.values(), ids=LABS)
def test_a_state_can_be_handed_on(kind, text):
    lab = kind.from_state(text)
    assert lab.state == text
    assert repr(kind.from_state(lab.state)) == repr(lab)
    box = find(lab, ipywidgets.Text)[0]
    assert box.value == text
    lab.reset()
    assert lab.state == text
    other = kind()
    find(other, ipywidgets.Text)[0].value = text
    assert repr(other) == repr(lab)


@pytest.mark.parametrize(("kind", "text"), LABS.values(), ids=LABS)
@pytest.mark.parametrize("bad", ["nonsense", "Q=1", "mask=12/x", "G=four", "imbalance=7", "mask=1"])
def test_a_bad_state_is_refused_in_words_and_changes_nothing(kind, text, bad):
    lab = kind()
    before = repr(lab)
    with pytest.raises((ValueError, traitlets.TraitError)):
        lab.state = bad
    assert repr(lab) == before
    find(lab, ipywidgets.Text)[0].value = bad
    assert repr(lab) == before
    assert "got" in lab._state_complaint.value


def test_the_lab_never_touches_the_log_probs_it_is_given():
    log_probs = torch.full((2, 4), -1.0, requires_grad=True)
    lab = StepLab(log_probs, MASK)
    lab.gradient_accumulation_steps = 4
    assert log_probs.grad is None
    assert log_probs.equal(torch.full((2, 4), -1.0))


def test_a_callback_works_whatever_grad_mode_and_device_its_thread_has():
    lab = StepLab()
    with torch.no_grad(), torch.device("meta"):
        lab.gradient_accumulation_steps = 4
    assert lab.gradient.equal(-MASK / 16)


def test_a_hand_waits_while_code_changes_the_lab():
    lab, order = StepLab(), []

    def paint():
        find(lab, TokenMask)[0].mask = MASK * 0
        order.append("hand")

    with lab._lock:
        hand = threading.Thread(target=paint)
        hand.start()
        hand.join(0.2)
        order.append("code")
    hand.join()
    assert order == ["code", "hand"]
    assert lab.num_tokens == 0


def test_the_mask_lab_opens_on_the_correct_mask_of_real_sentences():
    lab = MaskLab()
    assert lab.preset == "correct"
    assert lab.num_tokens == len("Lima") + len("4") + 2
    assert "left out: none" in repr(lab).replace("\n", " ")


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_of_the_mask_lab_trains_on_what_it_says(preset):
    lab = MaskLab(["ab"], ["cd"])
    lab.preset = preset
    assert lab.preset == find(lab, ipywidgets.Dropdown)[0].value == preset
    correct = torch.tensor([[0, 1, 1, 1]], dtype=torch.bool)  # labels: b c d eos
    assert torch.tensor(lab.mask).bool().equal(PRESETS[preset].make(correct))
    torch.testing.assert_close(lab.gradient, expected_gradient(lab))
    sentence = repr(lab).replace("\n", " ")
    assert PRESETS[preset].consequence in sentence
    wrong = {"prompt leaked in": "b", "one too early": "b"}.get(preset, "none")
    missing = {"one too late": "c", "one too early": "<eos>", "eos missing": "<eos>", "all masked": "c d <eos>"}
    assert f"not response: {wrong}. Response tokens left out: {missing.get(preset, 'none')}." in sentence


def test_a_mask_painted_by_hand_is_called_so_and_a_preset_painted_by_hand_is_recognised():
    lab = MaskLab(["ab"], ["cd"])
    find(lab, TokenMask)[0].mask = [[1, 0, 0, 1]]
    assert lab.preset == find(lab, ipywidgets.Dropdown)[0].value == "painted by hand"
    assert "A mask of your own." in find(lab, StageChain)[0].words
    lab.mask = [[0, 1, 1, 0]]
    assert lab.preset == "eos missing"
    lab.preset = "painted by hand"
    assert lab.preset == find(lab, ipywidgets.Dropdown)[0].value == "eos missing"
    lab.reset()
    assert lab.preset == "correct"


@pytest.mark.parametrize("rule", RULES)
def test_the_accumulation_lab_shows_what_accumulate_computes(rule):
    lab = AccumulationLab(8, 3, rule, imbalance=0.7)
    model = TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=256).double()
    batch = ragged_minibatch(8, 0.7)
    result = accumulate(model, split_minibatch(batch, 3), rule=rule, keep_running=True)
    reference = full_batch_gradient(model, batch)
    for played, gradient in enumerate(result.running, start=1):
        lab.played = played
        expected = compare(gradient, reference)
        assert (lab.ratio, lab.cosine) == (expected.ratio, expected.cosine)
        assert find(lab, Bars)[0].rows[0]["value"] == expected.ratio
    lab.played = 0
    assert lab.ratio == 0
    assert lab.microbatch_bytes * 3 > lab.full_batch_bytes > lab.microbatch_bytes * 2
    is_equal = "together give the gradient of the full batch" in AccumulationLab(8, 3, rule, played=3).words()
    assert is_equal == (rule == "token_mean")


def test_one_microbatch_is_not_said_to_save_memory():
    lab = AccumulationLab(8, 1, played=1)
    assert lab.microbatch_bytes == lab.full_batch_bytes
    assert lab.words() == "One microbatch is the full batch: the same gradient, and the same memory."


def test_the_accumulation_lab_keeps_its_settings_possible():
    lab = AccumulationLab(32, 32, played=32)
    lab.num_sequences = 8
    assert (lab.gradient_accumulation_steps, lab.played) == (8, 8)
    lab.gradient_accumulation_steps = 2
    assert lab.played == 2
    assert {slider.max for slider in find(lab, ipywidgets.Play)} == {2}


def test_the_accumulation_lab_shows_the_response_tokens_of_each_microbatch():
    lab = AccumulationLab(8, 4)
    for steps in (4, 1, 8):
        lab.gradient_accumulation_steps = steps
        assert f">{lab.numbers()[0]}<" in find(lab, ipywidgets.HTML)[1].value
    counts, total = re.fullmatch(r"Response tokens per microbatch: (.+) = (\d+)\.", lab.numbers()[0]).groups()
    assert sum(map(int, counts.split(" + "))) == int(total) == int(ragged_minibatch(8, 0.5)["response_mask"].sum())


def test_what_is_played_to_its_end_stays_so_when_g_changes():
    lab = AccumulationLab(8, 4, "notes", played=4)
    steps = find(lab, ipywidgets.IntSlider)[1]
    for steps.value in (5, 2, 8):
        assert lab.played == steps.value
        assert repr(lab) == repr(AccumulationLab(8, steps.value, "notes", played=steps.value))
    lab.num_sequences = 32
    lab.gradient_accumulation_steps = 32
    lab.num_sequences = 9
    assert (lab.gradient_accumulation_steps, lab.played) == (9, 9)
    for text in ("G=5 played=4", "G=9 played=5", "G=8 played=0"):
        lab.state = text
        assert {*text.split()} < {*lab.state.split()}
    lab.played = 3
    lab.gradient_accumulation_steps = 4
    assert lab.played == 3


def test_the_accumulation_lab_opens_before_the_first_microbatch_and_its_axis_stays():
    lab = AccumulationLab(8, 4, "notes")
    bars = find(lab, Bars)[0]
    assert (lab.played, lab.ratio) == (0, 0)
    assert "length 0.0000x, no direction yet." in repr(lab)
    assert [row["label"] for row in bars.rows] == [".grad after 0 of 4", "full batch"]
    limits, lengths = bars.limits, []
    for lab.played in range(5):
        lengths.append(bars.rows[0]["value"])
        assert bars.limits == limits
    assert lengths == sorted(lengths)
    assert limits == [0, lengths[-1]]


def test_memory_is_measured_whatever_grad_mode_its_thread_has():
    with torch.no_grad(), torch.device("meta"):
        lab = AccumulationLab(11, 3)  # as no other test asks for: nothing of it is remembered
    assert lab.full_batch_bytes > 2 * lab.microbatch_bytes > 0


@pytest.mark.parametrize("value", [500.0, 0.0, float("nan")])
def test_a_number_out_of_range_is_answered_in_words_and_taken_back(value):
    lab = ScalingLab()
    before, field = repr(lab), find(lab, ipywidgets.FloatText)[0]
    field.value = value
    assert (repr(lab), field.value) == (before, 1)
    assert lab._complaint.value == f'<span role="alert">max_norm: got {value}; expected 0.01 to 100</span>'
    field.value = 5
    assert (lab.max_norm, lab._complaint.value) == (5, "")


def test_the_scaling_lab_says_the_direction_beside_each_length():
    lab = ScalingLab(3, 1)
    for row in find(lab, Bars)[0].rows:
        rule, cosine = row["label"], lab.results[row["label"]]["comparison"].cosine
        assert row["note"] == f"D = {RULES[rule].formula}, cosine {cosine:.4f}"


def test_the_scaling_lab_tells_length_from_direction():
    lab = ScalingLab(4, 1.0)
    cosines = {rule: result["comparison"].cosine for rule, result in lab.results.items()}
    assert [rule for rule, cosine in cosines.items() if cosine < 0.99] == ["microbatch_token_mean"]
    ratios = {rule: result["comparison"].ratio for rule, result in lab.results.items()}
    assert ratios["token_mean"] == pytest.approx(1, abs=1e-12)
    assert ratios["microbatch_mean"] / ratios["notes"] == pytest.approx(4, abs=1e-12)
    assert {row["label"]: row["value"] for row in find(lab, Bars)[0].rows} == ratios
    assert "reached by token_mean;" in lab.words()
    lab.imbalance = 0
    assert "reached by microbatch_token_mean and token_mean;" in lab.words()


@pytest.mark.parametrize(("kind", "text"), LABS.values(), ids=LABS)
def test_every_lab_can_be_saved_as_png_and_svg(kind, text, tmp_path):
    save = find(kind.from_state(text), SavePicture)[0]
    assert save.to_file(tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in save.to_file(tmp_path / "lab.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [StepLab, MaskLab, AccumulationLab, ScalingLab, Prediction])
def test_a_closed_lab_is_let_go(kind):
    lab = kind("Which?", ["1"], "1", "") if kind is Prediction else kind()
    reference = weakref.ref(lab)
    close(lab)
    del lab
    gc.collect()
    assert reference() is None


def close(widget):
    for child in getattr(widget, "children", ()):
        close(child)
    widget.close()


class OneToken:
    """A tokenizer whose only token is a hostile text."""

    pad_token_id, eos_token_id = 1, 2

    def encode(self, text, *, add_special_tokens=True):
        return [0] * len(text)

    def decode(self, token_ids):
        return "<img src=x onerror=alert(1)>" * len(token_ids)


def test_hostile_text_enters_a_lab_only_as_text():
    lab = MaskLab(["ab"], ["cd"], model=lambda ids: torch.zeros(*ids.shape, 3), tokenizer=OneToken())
    lab.preset = "all masked"
    prediction = Prediction("<img src=x>", ["<i>1</i>"], "<i>1</i>", "<script>")
    prediction.choice = "<i>1</i>"
    prediction.reveal()
    assert "<img" in lab.words()
    for html in [*find(lab, ipywidgets.HTML), *find(prediction, ipywidgets.HTML)]:
        assert not set(re.findall(r"<(\w+)", html.value)) - {"b", "p", "small", "span"}


def test_the_mime_bundle_has_the_whole_text_the_picture_and_the_widget():
    for widget in (StepLab(), AccumulationLab(), ScalingLab(), show_step(_traced())):
        bundle = widget._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert data["text/plain"] == repr(widget)
        assert data["image/png"].startswith(b"\x89PNG")
        assert "application/vnd.jupyter.widget-view+json" in data


def _traced():
    trace = Trace()
    log_probs = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], requires_grad=True)
    sft_microbatch_train_step(log_probs, MASK, 2, tap=trace)
    return trace


def test_show_step_says_in_words_what_it_shows():
    view = show_step(_traced())
    assert view.alt == (
        "num_tokens 7, masked_sum -2.8000, loss 1.4000, scaled_loss 0.7000, gradient -0.2500 where the mask is 1."
    )
    assert (view.width, view.height) == (845, 223)


def test_a_prediction_reveals_nothing_before_a_choice():
    prediction = Prediction("Which?", ["1", "2"], answer="2", because="It is even.")
    button = find(prediction, ipywidgets.Button)[0]
    assert button.disabled
    assert prediction.reveal() == "Choose an answer first."
    assert "even" not in repr(prediction)
    find(prediction, ipywidgets.RadioButtons)[0].value = "1"
    assert not button.disabled
    button.click()
    assert "You said: 1. The answer is: 2. It is even." in find(prediction, ipywidgets.HTML)[-1].value
    prediction.choice = "2"
    assert find(prediction, ipywidgets.HTML)[-1].value == ""
    assert prediction.reveal() == "Right. The answer is: 2. It is even."


def test_a_prediction_without_its_answer_is_refused():
    with pytest.raises(ValueError, match=r"answer: got '3'; expected one of \['1', '2'\]"):
        Prediction("Which?", ["1", "2"], answer="3", because="")


def test_the_widgets_never_import_pyplot():
    code = "import sys, sft_edu.widgets as w; w.StepLab(); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
