"""Labs and predictions, driven as a hand would drive them, without a browser."""

import subprocess
import sys
import threading

import ipywidgets
import pytest
import torch
import traitlets

from sft_edu import RULES, Trace, closed_form, sft_microbatch_train_step
from sft_edu.masks import PRESETS
from sft_edu.widgets import MaskLab, Prediction, StepLab, show_step

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
        "StepLab(G=2, c=1, rule='notes', mask='1101 1111')\n"
        "num_tokens 7, masked_sum -2.8000, loss 1.4000, scaled_loss 0.7000, gradient -0.2500 where the mask\n"
        "is 1.\n"
        "Each of the 7 response tokens gets the gradient -0.2500 = -1 / (c·G²), where c·G² = 4. Every other\n"
        "token gets exactly 0."
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_slider_the_constant_and_the_rule_move_the_gradient(rule):
    lab = StepLab()
    find(lab, ipywidgets.IntSlider)[0].value = 5
    find(lab, ipywidgets.BoundedFloatText)[0].value = 2.5
    find(lab, ipywidgets.Dropdown)[0].value = rule
    assert (lab.gradient_accumulation_steps, lab.normalize_constant, lab.rule) == (5, 2.5, rule)
    torch.testing.assert_close(lab.gradient, expected_gradient(lab), rtol=1e-6, atol=0)


def test_code_moves_the_controls():
    lab = StepLab()
    lab.gradient_accumulation_steps = 7
    lab.rule = "token_mean"
    assert find(lab, ipywidgets.IntSlider)[0].value == 7
    assert find(lab, ipywidgets.Dropdown)[0].value == "token_mean"


def test_a_toggle_changes_the_mask_and_a_mask_changes_the_toggles():
    lab = StepLab()
    toggles = find(lab, ipywidgets.ToggleButton)
    toggles[2].value = True
    assert lab.mask == ((1, 1, 1, 1), (1, 1, 1, 1))
    assert lab.num_tokens == 8
    lab.mask = torch.zeros(2, 4, dtype=torch.bool)
    assert not any(toggle.value for toggle in toggles)
    assert lab.loss == 0
    assert "exactly 0" in repr(lab)


def test_every_change_draws_a_new_picture_with_words_that_are_true_of_it():
    lab = StepLab()
    pictures, words = {lab._view.png}, {lab._view.alt}
    for steps in (1, 3, 32):
        lab.gradient_accumulation_steps = steps
        pictures.add(lab._view.png)
        words.add(lab._view.alt)
        assert f"loss {2.8 / steps:.4f}" in lab._view.alt
        assert f"where c·G² = {steps**2}" in find(lab, ipywidgets.HTML)[-1].value
    assert len(pictures) == len(words) == 4


def test_one_figure_serves_all_updates():
    lab = StepLab()
    figure = lab._picture.figure
    for steps in range(1, 33):
        lab.gradient_accumulation_steps = steps
    assert lab._picture.figure is figure
    assert len(figure.axes) == 3


def test_reset_brings_back_the_start():
    lab = StepLab(gradient_accumulation_steps=3)
    start = repr(lab)
    lab.gradient_accumulation_steps, lab.normalize_constant, lab.rule = 9, 4.0, "sequence_mean"
    lab.mask = 1 - MASK
    assert repr(lab) != start
    find(lab, ipywidgets.Button)[0].click()
    assert repr(lab) == start


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
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(name, value):
    lab = StepLab()
    before = repr(lab)
    with pytest.raises(traitlets.TraitError, match=r"mask|rule|gradient_accumulation_steps|normalize_constant"):
        setattr(lab, name, value)
    assert repr(lab) == before


def test_the_lab_never_touches_the_log_probs_it_is_given():
    log_probs = torch.full((2, 4), -1.0, requires_grad=True)
    lab = StepLab(log_probs, MASK)
    lab.gradient_accumulation_steps = 4
    assert log_probs.grad is None
    assert log_probs.equal(torch.full((2, 4), -1.0))


def test_a_callback_works_on_another_thread_and_where_gradients_are_off():
    lab = StepLab()
    with torch.no_grad():
        lab.gradient_accumulation_steps = 4
    failures = []
    threads = [
        threading.Thread(target=_drive, args=(lab, steps, failures), name=f"drive-{steps}") for steps in (3, 5, 7, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    torch.testing.assert_close(lab.gradient, expected_gradient(lab), rtol=1e-6, atol=0)


def _drive(lab, steps, failures):
    try:
        for _ in range(3):
            lab.gradient_accumulation_steps = steps
    except Exception as error:
        failures.append(error)


def test_the_mask_lab_opens_on_the_correct_mask_of_real_sentences():
    lab = MaskLab()
    assert lab.preset == "correct"
    assert lab.num_tokens == len("Lima") + len("4") + 2
    assert "left out: none" in repr(lab).replace("\n", " ")


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_of_the_mask_lab_trains_on_what_it_says(preset):
    lab = MaskLab(["ab"], ["cd"])
    lab.preset = preset
    assert find(lab, ipywidgets.Dropdown)[0].value == preset
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
    lab.mask = [[1, 0, 0, 1]]
    assert lab.preset == "painted by hand"
    assert "A mask of your own." in lab._view.alt
    lab.mask = [[0, 1, 1, 0]]
    assert lab.preset == "eos missing"
    lab.reset()
    assert lab.preset == "correct"


def test_hostile_text_enters_a_lab_only_as_text():
    hostile = "<img src=x onerror=alert(1)>"
    lab = MaskLab([hostile], [hostile])
    lab.preset = "all masked"
    for html in find(lab, ipywidgets.HTML):
        assert "<i" not in html.value


def test_the_mime_bundle_has_the_whole_text_the_picture_and_the_widget():
    for widget in (StepLab(), show_step(_traced())):
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
    assert "Not 1. It is 2. It is even." in find(prediction, ipywidgets.HTML)[-1].value
    prediction.choice = "2"
    assert find(prediction, ipywidgets.HTML)[-1].value == ""
    assert prediction.reveal() == "Right. It is 2. It is even."


def test_a_prediction_without_its_answer_is_refused():
    with pytest.raises(ValueError, match=r"answer: got '3'; expected one of \['1', '2'\]"):
        Prediction("Which?", ["1", "2"], answer="3", because="")


def test_the_widgets_never_import_pyplot():
    code = "import sys, sft_edu.widgets as w; w.StepLab(); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
