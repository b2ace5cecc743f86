"""Check a learner's training loop by the weights that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import call, judged, reading, smallest
from sft_edu.exercises.training_mistakes import named_mistake
from sft_edu.exercises.training_runs import LEARNING_RATE, RIGHT, Minibatches, flat_weights, fresh_model, train_as
from sft_edu.exercises.verdict import NOT_STARTED, Verdict, right, wrong

_PROMPT, _LONGEST = 2, 8

# Response tokens of each sequence, in microbatches, in minibatches.
Plan = Sequence[Sequence[Sequence[int]]]
_TELLING: Plan = ([[1, 5], [2]], [[4], [1, 1]], [[3]])
_PLANS: tuple[Plan, ...] = ([[[2]]], [[[2], [2]]], [[[1], [3]]], [[[2]], [[1]]], [[[1], [3]], [[2]]], _TELLING)
_BETWEEN = {"+": "sequences", ",": "microbatches", ";": "minibatches"}
_TOLERANCE = 1e-5  # of how far the weights moved: below float32's rounding of a step, far below any mistake


@remembered
@judged
def check_training_loop(train: Callable[..., object]) -> Verdict:
    """Check a loop that trains a model for one epoch.

    Args:
        train: called as `train(model, minibatches, optimizer)`. A minibatch is a list of microbatches, dicts with
            `input_ids`, `labels` and `response_mask`; the last minibatch has fewer of them. The optimizer is SGD. The
            model has to move as by one step for each minibatch, along its mean over response tokens.
    """
    plan = _TELLING
    run = _run(train, plan)
    case, largest = smallest(map(_Case, _PLANS), partial(_compare, train))
    if not case:
        steps = len(plan)
        return right(
            f"{sum(map(len, plan))} microbatches, {steps} steps: the weights are those of {steps} full batches."
        )
    if not run.events and torch.equal(run.weights, flat_weights(fresh_model())):
        return NOT_STARTED
    if _is_right(run.weights, minibatches_of(plan)):
        return wrong("other", "These weights are right, but not those of fewer minibatches.", case, largest)
    if any(rate != LEARNING_RATE for rate in run.rates):
        hint = "The learning rate was changed on the way. Leave the optimizer as it is."
        return wrong("learning-rate-changed", hint, case, largest)
    return wrong(*named_mistake(run.weights, run.events, minibatches_of(plan)), case, largest)


@dataclass(frozen=True, eq=False)
class _Run:
    """The weights afterwards; `b` for each backward and `s` for each step, in order; the learning rate of each step."""

    weights: torch.Tensor
    events: str
    rates: list[float]


class _Case(tuple):
    """A plan."""

    def __str__(self) -> str:
        counts = "; ".join(", ".join("+".join(map(str, lengths)) for lengths in window) for window in self)
        signs = [f"'{sign}' between {what}" for sign, what in _BETWEEN.items() if sign in counts]
        return f"Minibatches of {counts} ({', '.join(['response tokens', *signs])})"


def minibatches_of(plan: Plan) -> Minibatches:
    """The same tokens every time: sequences of a prompt, a response and padding."""
    generator = torch.Generator().manual_seed(0)
    return [[_microbatch(lengths, generator) for lengths in window] for window in plan]


def _microbatch(lengths: Sequence[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(fresh_model().vocab_size, (len(lengths), _LONGEST), generator=generator)
    place = torch.arange(_LONGEST - 1)
    ends = torch.tensor(lengths).unsqueeze(1) + _PROMPT
    mask = (place >= _PROMPT) & (place < ends)
    return {"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone(), "response_mask": mask}


def _run(train: Callable, plan: Plan, quiet: bool = False) -> _Run:
    model, events, rates = fresh_model(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    model.logits.register_post_accumulate_grad_hook(lambda parameter: events.append("b"))
    optimizer.register_step_post_hook(lambda *arguments: events.append("s"))
    optimizer.register_step_pre_hook(lambda used, *arguments: rates.append(used.param_groups[0]["lr"]))
    call(train, model, minibatches_of(plan), optimizer, quiet=quiet)
    with reading("the model that was given, with the weights it had"):
        return _Run(flat_weights(model), "".join(events), rates)


def _is_right(weights: torch.Tensor, minibatches: Minibatches) -> bool:
    return _distance(weights, train_as(RIGHT, minibatches)) <= _TOLERANCE


def _distance(weights: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to how far the expected weights moved; infinite where they cannot be compared."""
    if weights.shape != expected.shape or not weights.isfinite().all():
        return float("inf")
    moved = (expected - flat_weights(fresh_model())).norm()
    return ((weights - expected).norm() / moved).item()


def _compare(train: Callable, plan: _Case) -> tuple[str, float | None] | None:
    weights, expected = _run(train, plan, quiet=True).weights, train_as(RIGHT, minibatches_of(plan))
    distance = _distance(weights, expected)
    if distance <= _TOLERANCE:
        return None
    if weights.shape != expected.shape:
        return f"{plan}: the model has other weights than before.", None
    text = f"{plan}: the weights end {_percent(distance)} of the right update away from where they should."
    return text, (weights - expected).abs().max().item()


def _percent(share: float) -> str:
    """Without digits after the point, but never 0%."""
    return f"{share:.0%}" if share >= 0.005 else f"{100 * share:.1g}%"
