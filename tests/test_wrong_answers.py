"""Every wrong answer gets its mistake, every right one passes, and no answer breaks the process."""

import itertools
import random
import sys
import time
from collections import Counter

import pytest
import torch
from wild_steps import WILD
from wrong_answers import RIGHT, WRONG

from sft_edu import exercises
from sft_edu.exercises import Verdict
from sft_edu.training.patterns import train_basic

CHECKS = [getattr(exercises, name) for name in exercises.__all__ if name.startswith("check_")]
OF_FUNCTIONS = [check for check in CHECKS if check is not exercises.check_returned_loss]


def identity(answer):
    return f"{answer.check.__name__.removeprefix('check_')}-{answer.name}"


def test_the_table_of_wrong_answers():
    """One line for each wrong answer: what it is, and the mistake it gets."""
    rows = [(answer, answer.check(answer.function)) for answer in WRONG]
    for answer, verdict in rows:
        print(f"{identity(answer):<60} -> {verdict.mistake}")
    assert len(rows) >= 40
    passed = [identity(answer) for answer, verdict in rows if verdict.passed]
    assert passed == []
    missed = [(identity(a), v.mistake, v.message) for a, v in rows if v.mistake != a.mistake or a.hint not in v.message]
    assert missed == []


def test_nearly_every_mistake_is_named():
    codes = Counter(answer.mistake for answer in WRONG)
    assert codes["other"] <= 0.05 * len(WRONG)
    assert len(codes) >= 40


def test_a_number_to_which_two_mistakes_lead_is_told_both():
    verdict = exercises.check_returned_loss(0.4, 3)
    assert verdict.mistake == "mask-ignored"
    assert "mask 0 is in your sum" in verdict.message
    assert "Or: That is a mean over tokens." in verdict.message


def test_a_small_distance_of_weights_is_not_called_0_percent():
    def trains(model, minibatches, optimizer):
        train_basic(model, minibatches, optimizer)
        with torch.no_grad():
            model.logits.mul_(1.0005)

    assert " 0%" not in exercises.check_training_loop(trains).case
    assert "%" in exercises.check_training_loop(trains).case


@pytest.mark.parametrize("answer", RIGHT, ids=identity)
def test_a_right_answer_passes_however_it_is_written(answer):
    verdict = answer.check(answer.function)
    assert verdict.passed, verdict
    assert (verdict.case, verdict.max_difference, verdict.mistake) == ("", None, "")
    assert repr(verdict) == f"Correct. {verdict.message}"
    assert "\n" not in repr(verdict)


@pytest.mark.parametrize("wild", WILD.values(), ids=WILD)
def test_no_step_of_the_wild_passes_but_those_by_the_notes(wild):
    verdict = exercises.check_sft_microbatch_train_step(wild.step)
    if wild[1:] == ("notes", "c·G²", ()):
        assert verdict.passed or verdict.mistake in ("raises", "loss-not-a-tensor"), verdict
    else:
        assert not verdict.passed
        assert verdict.mistake


def test_every_check_has_right_and_wrong_answers():
    for answers in (WRONG, RIGHT):
        assert {answer.check for answer in answers} == set(OF_FUNCTIONS)
        assert len({identity(answer) for answer in answers}) == len(answers)


@pytest.mark.parametrize("answer", WRONG[::5], ids=identity)
def test_a_verdict_is_a_few_short_lines(answer):
    verdict = answer.check(answer.function)
    lines = str(verdict).splitlines()
    assert lines[0].startswith("Not yet. ")
    assert len(lines) <= 3
    assert max(map(len, lines)) <= 330
    assert ("\nSmallest failing case: " in str(verdict)) == bool(verdict.case)
    assert ("\nLargest difference: " in str(verdict)) == (verdict.max_difference is not None)


def test_the_smallest_case_can_be_followed_by_hand():
    verdict = exercises.check_masked_normalize(lambda x, m, dim, c: x.sum() / c)
    assert verdict.case == "tensor [[1, 2]], mask [[1, 0]] (bool), dim = None, c = 1: got 3, expected 1."
    assert verdict.max_difference == 2


# --- Hostile answers ---


def raises(*_, **__):
    raise ValueError("not today")


def raises_with_a_bad_text(*_, **__):
    class Bad(Exception):
        def __str__(self):
            raise RuntimeError

    raise Bad


def leaves(*_, **__):
    sys.exit(3)


class Unreadable(dict):
    """Raises however it is looked at."""

    def __getattribute__(self, name):
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise RuntimeError(name)

    def __iter__(self):
        raise RuntimeError

    def __float__(self):
        raise RuntimeError

    def __contains__(self, key):
        raise RuntimeError

    def __getitem__(self, key):
        raise RuntimeError


def changes_everything(*arguments, **__):
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            argument.data.zero_()
        if isinstance(argument, torch.nn.Module):
            argument.half()
        if isinstance(argument, list):
            argument.clear()


def dismantles(model, *_, **__):
    if isinstance(model, torch.nn.Module):
        for name, _ in list(model.named_parameters(recurse=False)):
            delattr(model, name)
        for name, _ in list(model.named_children()):
            delattr(model, name)


def moves_away(model, *_, **__):
    return model.to("meta") if hasattr(model, "to") else None


def turns_gradients_off(*_, **__):
    torch.set_grad_enabled(False)
    return torch.zeros(())


def changes_global_state(*_, **__):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    random.seed(7)
    torch.set_grad_enabled(False)
    sys.stdout = None
    torch.inference_mode().__enter__()
    return "done"


def sleeps(*_, **__):
    time.sleep(0.002)


HOSTILE = [
    raises,
    raises_with_a_bad_text,
    leaves,
    changes_everything,
    dismantles,
    moves_away,
    turns_gradients_off,
    changes_global_state,
    sleeps,
    lambda *_, **__: None,
    lambda *_, **__: "0.7",
    lambda *_, **__: Unreadable(),
    lambda *_, **__: (),
    lambda *_, **__: (Unreadable(), Unreadable()),
    lambda *_, **__: {"log_probs": None},
    lambda *_, **__: {"log_probs": Unreadable()},
    lambda *_, **__: torch.tensor(float("nan")),
    lambda *_, **__: torch.ones(2, 3, dtype=torch.complex64),
    lambda *_, **__: torch.empty(2, device="meta"),
    lambda *_, **__: torch.eye(2).to_sparse(),
    lambda *_, **__: iter(()),
    lambda *_, **__: itertools.count(),
    lambda: None,
    3.5,
    "a string",
    None,
    Unreadable(),
]


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        sys.stdout,
    )


@pytest.mark.parametrize("check", OF_FUNCTIONS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: getattr(answer, "__name__", type(answer).__name__))
def test_a_hostile_answer_gets_a_verdict_and_changes_nothing(check, answer):
    before = state()
    verdict = check(answer)
    assert state() == before
    assert isinstance(verdict, Verdict)
    assert not verdict.passed
    assert verdict.mistake
    assert str(verdict).startswith("Not yet. ")


@pytest.mark.parametrize(
    "answer", [None, "x", [], torch.ones(3), float("nan"), Unreadable(), 1 + 2j, torch.tensor(True)]
)
def test_a_strange_number_gets_a_verdict(answer):
    assert not exercises.check_returned_loss(answer, 3).passed


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_interrupt_passes_through(check):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if check in OF_FUNCTIONS:
        with pytest.raises(KeyboardInterrupt):
            check(interrupted)


@pytest.mark.parametrize("check", OF_FUNCTIONS, ids=lambda check: check.__name__)
def test_what_is_not_started_is_told_apart_from_what_is_wrong(check):
    for unattempted in (..., lambda *_, **__: ...):
        verdict = check(unattempted)
        assert (verdict.passed, verdict.mistake) == (False, "not-started")
        assert repr(verdict) == "Not yet. Replace the ... with your answer and run the cell again."


def test_what_an_answer_prints_is_shown_once(capsys):
    def chatty(tensor, mask, dim, constant):
        print("here")
        return tensor.masked_fill(mask == 0, 0).sum(() if dim is None else dim) / constant

    assert exercises.check_masked_normalize(chatty).passed
    assert capsys.readouterr().out == "here\n"


def test_the_checks_judge_alike_whatever_is_set_outside():
    answers = [next(answer for answer in RIGHT if answer.check is check) for check in OF_FUNCTIONS]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.set_default_dtype(torch.float64)
        try:
            assert all(answer.check(answer.function).passed for answer in answers)
            assert exercises.check_returned_loss(2.8 / 9, 3).passed
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rule", ["notes", "microbatch_mean", "sequence_mean", "microbatch_token_mean", "token_mean"])
def test_a_step_is_checked_by_the_rule_that_is_asked_for(rule):
    from sft_edu import RULES, sft_microbatch_train_step

    for other in RULES:

        def step(log_probs, mask, steps, constant, minibatch_tokens=41, other=other):
            return sft_microbatch_train_step(
                log_probs, mask, steps, constant, rule=other, minibatch_tokens=minibatch_tokens
            )

        assert exercises.check_sft_microbatch_train_step(step, rule=rule).passed == (rule == other)
