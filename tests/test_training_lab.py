"""The lab that trains: in a thread of its own, stopped within a microbatch, the same as the loop without a lab."""

import dataclasses
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from itertools import islice

import ipywidgets
import pytest
import torch
import traitlets
from test_widgets import close, find

from sft_edu.data.encode import encode
from sft_edu.data.tasks import make_examples
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.tiny_run import TINY_CONFIG, tiny_examples, tiny_model
from sft_edu.training.train import OutOfMemory, Training
from sft_edu.widgets import Answers, Curves, SavePicture, TrainingLab, training_lab, training_view
from sft_edu.widgets.training_run import TrainingRun

FEW = make_examples(200)
ASKED = make_examples(30, split="test")
OPENING = """\
TrainingLab: G=4 microbatch=16 rule=token_mean optimizer=adamw lr=0.003 max_norm=1 prompt=0
Step 0 of 800: 0 of 51,200 sequences, 0 tokens trained on.
Nothing is trained yet: of 300 held-out answers none is right."""


@pytest.fixture
def make():
    """Labs on few examples, closed at the end, which ends their threads."""
    made = []

    def new(*arguments, **settings) -> TrainingLab:
        made.append(TrainingLab(*(arguments or (FEW, ASKED)), **settings))
        return made[-1]

    yield new
    for lab in made:
        lab.close()
    until(lambda: trainers() == [])


def trainers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "TrainingLab"]


def until(is_true, seconds=20) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def weights(lab: TrainingLab) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in lab.model.parameters()])


def button(lab: TrainingLab, *descriptions: str) -> ipywidgets.Button:
    return next(found for found in find(lab, ipywidgets.Button) if found.description in descriptions)


def control(lab: TrainingLab, description: str) -> ipywidgets.Widget:
    return next(found for found in find(lab, ipywidgets.Widget) if getattr(found, "description", "") == description)


def curves(lab: TrainingLab) -> Curves:
    return find(lab, Curves)[0]


# --- What it shows ---


def test_it_opens_before_any_training(make):
    lab = TrainingLab()
    assert repr(lab) == OPENING
    assert (lab.steps, lab.exact_match, lab.running) == (0, 0.0, False)
    assert curves(lab).status.startswith("ready on ")
    lab.close()


def test_it_trains_as_the_loop_does_without_a_lab():
    lab = TrainingLab()
    lab.run(3)
    tokenizer, threads = ByteTokenizer(), torch.get_num_threads()
    torch.set_num_threads(1)
    examples = encode(tiny_examples(), tokenizer)
    config = dataclasses.replace(TINY_CONFIG, warmup_steps=lab._run.training.num_steps // 16)
    training = Training(tiny_model(), examples, config, pad_token_id=tokenizer.pad_token_id)
    records = list(islice(training, 3))
    torch.set_num_threads(threads)
    for ours, theirs in zip(lab.model.parameters(), training.model.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0 if ours.device.type == "cpu" else 1e-2)
    if lab.model.head.weight.device.type == "cpu":
        assert lab._run.records == records
    lab.close()


def test_every_number_shown_is_that_of_the_run(make):
    lab = make(gradient_accumulation_steps=2, max_norm=0.5)
    lab.run(12)
    records, looks, view = lab._run.records, lab._run.looks, curves(lab)
    assert lab.steps == len(records) == 12
    seen = [0.2 * epoch + s for epoch in (0, 1) for s in (0.032, 0.064, 0.096, 0.128, 0.16, 0.192, 0.2)]
    by_look = {(line["panel"], line["look"]): line["points"] for line in view.lines}
    nll, norm, clipped = (by_look[0, "token_mean"], by_look[1, "gradient"], by_look[1, "clipped"])
    for record, *points in zip(records, seen, nll, norm, clipped, strict=False):
        expected = (record.nll, record.grad_norm, record.clipped_norm)
        assert [y for _, y in points[1:]] == pytest.approx(expected, rel=1e-4)
        assert [x for x, _ in points[1:]] == pytest.approx([points[0]] * 3)
    assert [seen for seen, _ in by_look[0, "held_out"]] == [look.seen / 1000 for look in looks]
    assert [nll for _, nll in by_look[0, "held_out"]] == pytest.approx([look.scores.nll for look in looks], rel=1e-4)
    assert by_look[2, "token_mean"] == [[look.seen / 1000, 100 * look.scores.exact_match] for look in looks]
    assert view.panels[0]["text"] == f"{records[-1].nll:.4f}"
    assert f"step 12 of {lab._run.training.num_steps}" in view.status
    assert view.words == lab.words()
    tokens = sum(record.num_tokens for record in records)
    assert f"{tokens:,} tokens trained on" in view.status
    assert f"{tokens:,} tokens trained on" in repr(lab)
    answers = find(lab, Answers)[0]
    assert answers.title == "held-out answers after step 12"
    assert [(row["prompt"], row["wanted"]) for row in answers.rows] == [
        (e.prompt.strip(), e.response) for e in ASKED[:6]
    ]
    assert [row["right"] for row in answers.rows] == [row["answer"] == row["wanted"] for row in answers.rows]


def test_time_is_on_the_screen_alone(make, monkeypatch):
    lab, said = make(), []
    monkeypatch.setattr(training_lab, "_PAUSE", 0)
    curves(lab).observe(lambda change: said.append(change["new"]), "status")
    lab.run(3)
    assert any("tokens/s" in text for text in said)
    assert "tokens/s" not in curves(lab).status + repr(lab)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "none is right"),
        (0.05, "hardly any is right"),
        (0.4, "less than half are right"),
        (0.98, "more than half are right, but not 99 %"),
        (1.0, "all are right"),
    ],
)
def test_the_words_are_verdicts(make, share, words):
    lab = make()
    lab.run(1)
    run = lab._run
    scores = dataclasses.replace(run.looks[0].scores, exact_match=share, nll=0.3 * run.looks[0].scores.nll)
    run.looks[-1] = dataclasses.replace(run.looks[-1], scores=scores)
    assert training_view.verdicts(run, "held-out").startswith(
        f"Of 30 held-out answers {words}; their NLL is less than half of what it was. Clipping shortened "
    )


def test_the_words_count_what_was_clipped(make):
    for max_norm, which in ((0.01, "every gradient"), (1e4, "no gradient")):
        lab = make(max_norm=max_norm)
        lab.run(2)
        assert f"Clipping shortened {which}." in lab.words()


def test_the_picture_has_the_same_lines(make, tmp_path):
    lab = make()
    lab.run(6)
    lab.rule = "notes"
    lab.run(2)
    figure = lab.figure()
    drawn = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    view = curves(lab)
    for index, lines in enumerate(drawn):
        assert lines == [line["points"] for line in (*view.before, *view.lines) if line["panel"] == index]
    path = find(lab, SavePicture)[0].to_file(tmp_path / "lab.svg")
    assert "sequences seen, in thousands" in path.read_text(encoding="utf-8")


def test_long_lines_are_thinned_and_keep_their_ends(make):
    lab = make()
    lab.run(1)
    record = lab._run.records[0]
    for count in (400, 401, 1000, 50_001):
        lab._run.records = [dataclasses.replace(record, step=step) for step in range(1, count + 1)]
        steps = [record.step for record in training_view._thinned(lab._run.records)]
        assert (steps[0], steps[-1]) == (1, count)
        assert count / 3 <= len(steps) if count < 1000 else len(steps) > 200
        assert len(steps) <= 401


# --- By hand ---


def test_every_control_moves_its_setting_and_follows_code(make):
    lab = make()
    moved = {"G": 3, "microbatch": 5, "rule": "notes", "optimizer": "sgd", "lr": 0.1, "max_norm": 10.0}
    for description, value in moved.items():
        control(lab, description).value = value
    control(lab, "train on prompt tokens too").value = True
    assert lab.state == "G=3 microbatch=5 rule=notes optimizer=sgd lr=0.1 max_norm=10 prompt=1"
    lab.learning_rate = 0.0042  # the menu has no such number, until it is set
    assert (control(lab, "lr").value, control(lab, "lr").label) == (0.0042, "0.0042")
    lab.reset()
    assert lab.state == make().state
    for trait, knob in lab._controls.items():
        assert knob.value == getattr(lab, trait)
    assert "0.0042" not in [label for label, _ in control(lab, "lr").options]


def test_buttons_start_pause_resume_and_step(make):
    lab = make()
    go = button(lab, "start")
    assert not button(lab, "one step").disabled
    button(lab, "one step").click()
    until(lambda: lab.steps == 1 and not lab.running)
    assert lab._run.looks[-1].step == 1
    until(lambda: go.description == "resume")
    go.click()
    assert (go.description, button(lab, "one step").disabled) == ("pause", True)
    until(lambda: lab.steps > 2)
    go.click()
    assert go.description == "resume"
    until(lambda: trainers() == [])
    steps = lab.steps
    button(lab, "reset").click()
    assert (lab.steps, go.description) == (0, "start")
    assert steps > 2


@pytest.mark.parametrize("way", ["button", "code"])
def test_a_pause_is_answered_within_a_microbatch(make, monkeypatch, way):
    lab, begun, go_on = make(gradient_accumulation_steps=8, microbatch_size=4), [], threading.Event()
    advance = TrainingRun.advance

    def slow(self):
        begun.append(time.monotonic())
        go_on.wait(20)
        return advance(self)

    monkeypatch.setattr(TrainingRun, "advance", slow)
    lab.start()
    until(lambda: begun)
    if way == "button":
        button(lab, "pause").click()  # does not wait for the microbatch
        assert not lab.running
        go_on.set()
    else:
        threading.Timer(0.1, go_on.set).start()
        lab.pause()
        assert lab._run.training.microbatch == 1
    until(lambda: trainers() == [])
    assert len(begun) == 1
    assert (lab.steps, lab._run.training.microbatch) == (0, 1)
    assert "1 of 7 microbatches of the next" in curves(lab).status or "1 of 8" in curves(lab).status


def test_stopped_and_started_it_is_the_same_run(make):
    whole, pieces = make(), make()
    whole.run(9)
    pieces.start(2)
    until(lambda: not pieces.running)
    pieces.start()
    until(lambda: pieces.steps > 3)
    pieces.pause()
    pieces.run(9 - pieces.steps)
    assert torch.equal(weights(pieces), weights(whole))
    assert pieces._run.records == whole._run.records
    assert repr(pieces) == repr(whole)


def test_other_code_runs_meanwhile_and_there_is_one_thread(make):
    lab = make()
    for _ in range(5):
        lab.start()
    assert len(trainers()) == 1
    before, done = lab.steps, 0
    until(lambda: lab.steps > before + 2)
    while lab.steps < before + 8:
        done += sum(range(100))
    assert done
    lab.pause()
    until(lambda: trainers() == [])
    steps = lab.steps
    time.sleep(0.1)
    assert lab.steps == steps


def test_pictures_are_sent_ten_times_a_second_at_most(make, monkeypatch):
    lab, drawn = make(), []
    monkeypatch.setattr(TrainingRun, "advance", lambda self: time.sleep(0.001))
    curves(lab).observe(lambda change: drawn.append(time.monotonic()), "drawn")
    begin = time.monotonic()
    lab.start()
    time.sleep(1)
    lab.pause()
    passed = time.monotonic() - begin
    assert 3 <= len(drawn) <= 10 * passed + 3  # and one each for start and end


def test_a_changed_setting_begins_again_and_keeps_the_run_before(make):
    lab = make()
    start = weights(lab)
    lab.run(7)
    trained = curves(lab).lines[0]["points"]
    lab.rule = "microbatch_mean"
    assert (lab.steps, lab.running) == (0, False)
    assert torch.equal(weights(lab), start)
    before = curves(lab).before
    assert [(line["panel"], line["look"]) for line in before] == [(0, "before"), (1, "before"), (2, "before")]
    assert before[0]["points"] == trained
    assert "Dotted: the run before, with rule=token_mean." in " ".join(repr(lab).split())
    lab.gradient_accumulation_steps = 2  # nothing was trained: the comparison stays
    assert curves(lab).before == before
    assert "with G=4 rule=token_mean." in " ".join(repr(lab).split())
    lab.reset()
    assert curves(lab).before == []


def test_a_running_lab_goes_on_with_the_new_run(make):
    lab = make()
    lab.start()
    until(lambda: lab.steps > 0)
    run = lab._run
    lab.max_norm = 0.1
    assert lab.running
    assert lab._run is not run
    until(lambda: lab.steps > 1)
    assert len(trainers()) == 1
    lab.reset()
    assert not lab.running
    until(lambda: trainers() == [])
    assert lab.steps == 0


def test_a_run_to_the_end_is_finished(make):
    lab = make(FEW[:3], microbatch_size=64, gradient_accumulation_steps=32)
    lab._material = dataclasses.replace(lab._material, num_sequences=9)
    lab.reset()
    lab.start()
    until(lambda: not lab.running)
    assert lab.steps == lab._run.training.num_steps == 3
    until(lambda: trainers() == [])
    assert (button(lab, "finished").disabled, button(lab, "one step").disabled) == (True, True)
    assert curves(lab).status.startswith("finished on ")
    lab.start()
    lab.run()
    assert lab.steps == 3
    button(lab, "reset").click()
    assert not button(lab, "start").disabled


# --- From code ---


MOODS = [
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.device("meta"),
    lambda: torch.autocast("cpu", torch.bfloat16),
]


@pytest.mark.parametrize("mood", MOODS)
def test_it_trains_the_same_in_every_mood_of_a_cell(make, mood):
    few = FEW[: 100 + MOODS.index(mood)]  # an order of examples that nobody has drawn and remembered
    with mood():
        here, there = make(few, ASKED), make(few, ASKED)
        there.start(3)
        until(lambda: not there.running)
        here.run(3)
    plain = make(few, ASKED)
    plain.run(3)
    assert here._run.records == there._run.records == plain._run.records
    assert torch.equal(weights(here), weights(plain))
    assert torch.equal(weights(there), weights(plain))
    assert repr(here) == repr(there) == repr(plain)


def test_it_trains_the_same_under_another_default_dtype(make):
    plain, other = make(), make()
    plain.run(2)
    torch.set_default_dtype(torch.float64)
    try:
        other.reset()
        other.run(2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weights(other), weights(plain))


def test_random_numbers_of_others_stay_as_they_are(make):
    lab, inside, go_on = make(), threading.Event(), threading.Event()

    def look(*_) -> None:
        if not torch.is_grad_enabled():  # the model is looked at, not trained
            inside.set()
            go_on.wait(20)
            go_on.clear()

    lab.model.register_forward_pre_hook(look)
    torch.manual_seed(3)
    random.seed(3)
    expected = [(torch.rand(2), random.random()) for _ in range(6)]
    torch.manual_seed(3)
    random.seed(3)
    drawn = []
    lab.start(1)  # and a look at the end
    for _ in range(5):
        assert inside.wait(20)
        inside.clear()
        drawn.append((torch.rand(2), random.random()))
        go_on.set()
    until(lambda: go_on.set() or not lab.running)
    drawn.append((torch.rand(2), random.random()))
    for ours, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]


def test_the_number_of_threads_of_others_stays_as_it_is(make):
    lab, counts, before = make(), [], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        lab.start()
        until(lambda: lab.steps > 0)
        other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        other.start()
        other.join()
        lab.pause()
        assert counts == [3]
        lab.run(1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_interrupt_stops_after_the_microbatch_and_loses_nothing(make):
    whole, lab = make(), make()

    def interrupt() -> None:
        until(lambda: lab.steps > 0)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        lab.run()
    assert not lab.running
    done = lab.steps + 2
    lab.run(2)
    whole.run(done)
    assert torch.equal(weights(lab), weights(whole))


@pytest.mark.parametrize("way", ["start", "run"])
def test_an_error_is_told_in_words_and_ends_the_run(make, monkeypatch, way):
    lab = make()
    lab.run(1)
    broken = OutOfMemory("microbatch_size: 16 sequences do <not> fit. Try microbatch_size 8")
    monkeypatch.setattr(Training, "run_microbatch", lambda self: (_ for _ in ()).throw(broken))
    if way == "start":
        lab.start()
        until(lambda: not lab.running)
    else:
        with pytest.raises(OutOfMemory, match="Try microbatch_size 8"):
            lab.run()
    until(lambda: trainers() == [])
    assert "do &lt;not&gt; fit. Try microbatch_size 8" in lab._complaint.value
    assert "OutOfMemory ended the run." in repr(lab)
    assert curves(lab).status.startswith("stopped on ")
    assert button(lab, "resume").disabled
    assert lab.steps == 1
    monkeypatch.undo()
    lab.microbatch_size = 8
    assert lab._complaint.value == ""
    lab.run(1)
    assert lab.steps == 1


def test_a_run_that_blows_up_is_still_drawn(make):
    lab = make(optimizer="sgd", learning_rate=10.0, max_norm=1e4, rule="microbatch_mean")
    lab.run(12)
    records, panels = lab._run.records, curves(lab).panels
    assert records[-1].nll > 1000
    assert panels[0]["limits"][1] >= max(record.nll for record in records)
    assert panels[1]["limits"][1] >= max(record.grad_norm for record in records)
    assert "their NLL is more than what it was" in " ".join(repr(lab).split())


def test_a_closed_lab_has_no_thread_and_is_let_go(make):
    lab = TrainingLab(FEW, ASKED)
    lab.start()
    reference = weakref.ref(lab)
    until(lambda: reference().steps > 0)
    close(lab)
    until(lambda: trainers() == [])
    del lab
    gc.collect()
    assert reference() is None


def test_a_process_ends_quietly_while_a_lab_trains():
    code = (
        "import time; from sft_edu.data.tasks import make_examples; from sft_edu.widgets import TrainingLab;"
        "lab = TrainingLab(make_examples(200)); lab.start(); time.sleep(1); print(lab.running)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 33),
        ("microbatch_size", 65),
        ("rule", "mean"),
        ("optimizer", "SGD"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_norm", float("inf")),
    ],
)
def test_a_wrong_setting_is_refused_and_changes_nothing(make, name, value):
    lab = make()
    lab.run(1)
    before, run = repr(lab), lab._run
    with pytest.raises(traitlets.TraitError, match=f"{name}: got"):
        setattr(lab, name, value)
    assert repr(lab) == before
    assert lab._run is run


def test_a_state_can_be_handed_on(make):
    text = "G=2 microbatch=8 rule=notes optimizer=sgd lr=0.05 max_norm=2.5 prompt=1"
    lab = TrainingLab.from_state(text, FEW, ASKED)
    other = make()
    other._state_box.value = lab.state
    assert lab.state == other.state == text
    assert repr(other) == repr(lab)
    for bad in ("prompt=2", "prompt=yes", "lr=fast", "steps=3", "microbatch=0"):
        other._state_box.value = bad
        assert other.state == text
        assert "got" in other._state_complaint.value
    lab.close()


def test_prompt_tokens_count_on_demand(make):
    plain, all_tokens = make(), make(train_on_prompt=True)
    plain.run(1)
    all_tokens.run(1)
    window = [FEW[i] for i in torch.randperm(len(FEW), generator=torch.Generator().manual_seed(0))[:64]]
    responses = sum(len(e.response) + 1 for e in window)  # and eos
    assert plain._run.num_tokens == responses
    assert all_tokens._run.num_tokens == responses + sum(len(e.prompt) - 1 for e in window)  # all but the first token
    assert "counts prompt tokens too" in all_tokens.words()


def test_people_bring_their_own_examples(make):
    lab = make(FEW[:4])
    lab.run(30)
    assert "of 4 training answers" in " ".join(repr(lab).split()).lower()
    assert curves(lab).panels[2]["title"] == "training answers right, %"
    assert [line["label"] for line in curves(lab).lines][:2] == ["training", "all of them"]
    with pytest.raises(ValueError, match="examples: got none"):
        TrainingLab([])
    with pytest.raises(ValueError, match="held_out: got none; expected at least one, or None"):
        TrainingLab(FEW, [])


def test_eight_threads_at_once_leave_it_in_step(make):
    lab, failures = make(), []
    hands = [lab.start, lab.pause, lab.reset, lambda: lab.run(1), lambda: setattr(lab, "rule", "notes")]
    hands += [lambda: setattr(lab, "microbatch_size", 8), lambda: lab.start(1), lambda: repr(lab)]

    def drive(thread: int) -> None:
        try:
            with torch.no_grad(), torch.device("meta"):
                for turn in range(8):
                    hands[(thread + turn * (thread + 1)) % len(hands)]()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=drive, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    lab.pause()
    until(lambda: trainers() == [])
    assert curves(lab).words == lab.words()
    assert f"step {lab.steps} of" in curves(lab).status
    assert button(lab, "start", "resume").disabled is False
    same = make()
    same.state = lab.state
    same.run(lab.steps)
    missing = lab._run.training.microbatch
    assert [r.nll for r in same.records] == [r.nll for r in lab.records], missing


@pytest.mark.timeout(600)
def test_the_model_learns_in_the_background_to_answer_what_it_has_not_seen():
    lab = TrainingLab()
    lab.start()
    until(lambda: lab.exact_match >= 0.99 or not lab.running, 500)
    lab.pause()
    assert lab._run.error is None
    assert lab.exact_match >= 0.99
    assert lab._run.looks[0].scores.exact_match == 0
    assert "Of 300 held-out answers at least 99 % are right" in repr(lab)
    lab.close()
