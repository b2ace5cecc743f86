"""The checks accept right answers, and name the mistake in wrong ones."""

from itertools import pairwise

import pytest
import torch

from sft_edu.exercises import check_response_mask, check_returned_loss, check_sft_microbatch_train_step
from sft_edu.exercises.step import _telling
from sft_edu.exercises.step_mistakes import CONSTANTS, denominators


def test_unsolved_exercises_get_a_verdict_and_no_error():
    for verdict in (
        check_returned_loss(..., 3),
        check_response_mask(lambda *_: ...),
        check_sft_microbatch_train_step(lambda *_: ...),
    ):
        assert not verdict.passed
        assert "Replace the ..." in repr(verdict)


@pytest.mark.parametrize("answer", [2.8 / 9, 0.311, 0.3111, torch.tensor(2.8 / 9)])
def test_the_loss_by_hand_is_accepted_to_three_digits(answer):
    assert check_returned_loss(answer, 3).passed


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (-0.311, "negative"),
        (2.8 / 3, "divided by G once"),
        (2.8, "not divided by G at all"),
        (3.6 / 9, "mask 0"),
        (0.7, "for G = 2"),
        (2.8 / 6, "2G"),
        (2.8 / 9 / 7, "mean over tokens"),
        (5.0, "Add the log-probs"),
        ("0.3", "a number is asked for"),
        (0.31, "three digits"),
        (True, "a number is asked for"),
    ],
)
def test_a_wrong_loss_gets_the_hint_for_its_mistake(answer, hint):
    verdict = check_returned_loss(answer, 3)
    assert not verdict.passed
    assert hint in verdict.message


def mask_row(prompt, output, longest):
    return [0] * (prompt - 1) + [1] * output + [0] * (longest - prompt - output)


@pytest.mark.parametrize("make", [mask_row, lambda *a: torch.tensor(mask_row(*a)), lambda *a: map(bool, mask_row(*a))])
def test_a_right_mask_is_accepted_as_list_tensor_or_iterator(make):
    assert check_response_mask(make).passed


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda p, o, n: ([0] * p + [1] * o + [0] * (n - p - o))[:-1], "one too late"),
        (lambda p, o, n: [0] * p + [1] * o + [0] * (n - p - o), "one fewer than tokens"),
        (lambda p, o, n: [1] * (p - 1 + o) + [0] * (n - p - o), "prompt leaked in"),
        (lambda p, o, n: [0] * (p - 1) + [1] * (n - p), "padding included"),
        (lambda p, o, n: [0] * (n - 1), "all masked"),
        (lambda p, o, n: [1] * (n - 1), "expected [0, 0, 1, 1, 0, 0, 0]. Label t is token t + 1"),
        (lambda p, o, n: [0.9] * (p - 1) + [1.9] * o + [0.2] * (n - p - o), "expected zeros and ones"),
        (lambda p, o, n: "x" * (n - 1), "a list of zeros and ones"),
        (lambda p, o, n: None, "a list of zeros and ones"),
        (lambda p, o, n: 1 // 0, "raised ZeroDivisionError"),
    ],
)
def test_a_wrong_mask_gets_the_hint_for_its_mistake(make, hint):
    verdict = check_response_mask(make)
    assert not verdict.passed
    assert hint in verdict.message


def step(loss_of, backward=1, detach=True):
    """A learner's step with the loss `loss_of(log_probs, mask, G, c)`."""

    def run(log_probs, mask, steps, constant):
        loss = loss_of(log_probs, mask, steps, constant)
        for _ in range(backward):
            loss.backward(retain_graph=True)
        return loss.detach() if detach else loss

    return run


def right(x, m, steps, c):
    return -(x * m).sum() / c / steps / steps


@pytest.mark.parametrize(
    "learners_step",
    [
        step(right),
        step(lambda x, m, g, c: right(x.float(), m, g, c)),
        lambda *a: torch.tensor(step(right)(*a).item()),
        lambda *a: step(right)(*a).clone(),
    ],
)
def test_a_right_step_is_accepted(learners_step):
    assert check_sft_microbatch_train_step(learners_step).passed


def test_no_two_known_mistakes_look_alike():
    case = _telling()
    known = [d * case.constant**k for *_, d in denominators(case.mask, case.steps) for *_, k in CONSTANTS]
    known.sort()
    assert all(larger / smaller > 1 + 1e-3 for smaller, larger in pairwise(known))


@pytest.mark.parametrize(
    ("learners_step", "hint"),
    [
        (step(lambda x, m, g, c: -right(x, m, g, c)), "less likely"),
        (step(lambda x, m, g, c: right(x, m, g, c) * g), "divided by G once."),
        (step(lambda x, m, g, c: right(x, m, g, c) * g * g), "not divided by G"),
        (step(lambda x, m, g, c: right(x, m, g, c) / g), "once too often"),
        (step(lambda x, m, g, c: right(x, m, g, c) * c), "normalize_constant is missing"),
        (step(lambda x, m, g, c: right(x, m, g, c) / m.sum()), "token count too"),
        (step(lambda x, m, g, c: right(x, m, g, c) / len(x)), "batch size"),
        (step(lambda x, m, g, c: -x.sum() / c / g / g), "Use the mask before you sum."),
        (step(right, backward=0), "No gradient arrived"),
        (step(right, backward=2), "doubled"),
        (step(right, detach=False), "still holds its graph"),
        (lambda *a: step(right)(*a) * 5, "The gradient is right, but the loss is"),
        (lambda *a: step(right)(*a).item(), "0-dim tensor; got float"),
        (step(lambda x, m, g, c: right(x, m, g, c) * 0.1234), "should be -1 / (c·G·G)"),
        (lambda *a: {}["x"], "raised KeyError"),
        (step(lambda x, m, g, c: -(x * m).sum() / c / len(x) / g), "rule sequence_mean"),
        (step(lambda x, m, g, c: -(x * m).sum() / m.sum() / g), "rule microbatch_token_mean"),
        (step(lambda x, m, g, c: -(x * m).sum() / c / (g + 2)), "G + 2"),
        (step(lambda x, m, g, c: -(x * m).sum() / c / g**g), "as often as there are microbatches"),
        (step(lambda x, m, g, c: right(x, m, g, c) / c), "divides twice"),
        (step(lambda x, m, g, c: right(x, m, g, c) * c * c), "it should divide"),
        (step(lambda x, m, g, c: -right(x, m, g, c) * g), "less likely. It is divided by G once."),
        (step(lambda x, m, g, c: -((x * m).sum(1) / m.sum(1)).sum() / c / g / g), "differs from token to token"),
        (step(lambda x, m, g, c: right(x, m, g, c).reshape(1)), "got shape [1]"),
        (lambda x, m, g, c: step(right)(x, m.fill_(1), g, c), "Use the mask before you sum."),
        (lambda x, m, g, c: step(right)(x, m.zero_(), g, c), "0 everywhere"),
    ],
)
def test_a_wrong_step_gets_the_hint_for_its_mistake(learners_step, hint):
    verdict = check_sft_microbatch_train_step(learners_step)
    assert not verdict.passed
    assert hint in verdict.message
