"""The questions that an audit of a step asks, one function each. Each yields problem codes with what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from sft_edu.audit.denominator import TOLERANCE, Point, number, series, varies
from sft_edu.audit.probe import Outcome, Probe
from sft_edu.audit.probe_cases import Case
from sft_edu.audit.token_weights import sequence_weights, token_problem

Finding = tuple[str, str]
Calls = Sequence[tuple[Case, Outcome]]

EMPTY = ("no response token", "one sequence without any", "two sequences without any")
"""The cases of `Cases.empty` in words."""

_SAME = 1e-9  # two calls with the same arguments, relative
_LOSS_TOLERANCE = 1e-5  # a sum of some twenty numbers, perhaps in float32


def arrived(outcome: Outcome) -> torch.Tensor | None:
    """The gradient that a call brought, also where the step cleared it afterwards. None if there was none."""
    for gradient in (outcome.gradient, *reversed(outcome.accumulated)):
        if gradient is not None and (gradient != 0).any():
            return gradient
    return None


def no_gradient(outcome: Outcome) -> Iterator[Finding]:
    hint = " The returned loss still has its graph: call .backward() on it." if "loss" in outcome.attached else ""
    if outcome.returned in ("generator", "coroutine"):
        hint = f" It returns a {outcome.returned}: nothing of it ran."
    state = "stayed None" if outcome.gradient is None else "is all 0"
    yield "no-backward", f".grad of the log-probs {state}.{hint}"


def not_deterministic(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """Of several calls with the same arguments."""
    gradients, losses = [arrived(outcome) for outcome in outcomes], [outcome.loss for outcome in outcomes]
    if not all(_alike(gradient, gradients[0], _SAME) for gradient in gradients):
        sums = ["none" if gradient is None else number(gradient.sum().item()) for gradient in gradients]
        yield "not-deterministic", f"The same arguments gave gradients that add up to {', '.join(sums)}."
    elif not all(_equal(loss, losses[0]) for loss in losses):
        yield "not-deterministic", f"The same arguments gave the losses {', '.join(map(_text, losses))}."


def not_finite(case: Case, outcome: Outcome) -> Iterator[Finding]:
    gradient = arrived(outcome)
    if gradient is not None and not gradient.isfinite().all():
        yield "not-finite", f"With {case} the gradient is not finite."


def coarse_dtype(calls: Calls) -> str | None:
    """The dtype of 16 bits that all gradients are rounded to, if they are; then their last digits mean nothing."""
    gradients = [arrived(outcome) for _, outcome in calls if arrived(outcome) is not None]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(gradient.to(dtype).double(), gradient) for gradient in gradients):
            return str(dtype).removeprefix("torch.")
    return None


def missing_gradient(calls: Calls) -> Iterator[Finding]:
    for case, outcome in calls:
        if arrived(outcome) is None:
            yield "no-backward", f"With {case} no gradient arrived."


def tokens(calls: Calls) -> Iterator[Finding]:
    """Which tokens are trained, in which direction, and whether those of one sequence count alike."""
    pairs = [(case.mask, arrived(outcome)) for case, outcome in calls if arrived(outcome) is not None]
    problem = token_problem(pairs)
    if problem:
        yield problem
    for mask, gradient in pairs:
        weights = sequence_weights(gradient, mask)
        if isinstance(weights, str):
            yield "uneven-weights", weights
            continue
        signs = {weight > 0 for weight in weights if weight is not None}
        if len(signs) > 1:
            yield "uneven-weights", "Some sequences are made more likely, others less."
        elif signs == {True}:
            shown = number(max(weight for weight in weights if weight is not None))
            yield "wrong-sign", f"The gradient of log p is +{shown}: going down lowers log p."


def log_prob_weights(gradient: torch.Tensor, other: torch.Tensor | None) -> Iterator[Finding]:
    """Of two calls that differ in the log-probs alone."""
    if not _alike(other, gradient, TOLERANCE):
        yield "uneven-weights", "Other log-probs under the same mask get other weights."


def losses(calls: Calls) -> Iterator[Finding]:
    """A loss that is linear in the log-probs is the sum of its gradient times the log-probs."""
    for case, outcome in calls:
        terms = case.log_probs * arrived(outcome) if arrived(outcome) is not None else torch.zeros(1)
        expected, room = terms.sum().item(), _LOSS_TOLERANCE * terms.abs().sum().item()
        if outcome.loss is None:
            yield "value-mismatch", f"What is returned first is {outcome.returned}; a loss is one number."
        elif not abs(outcome.loss - expected) <= room:
            ratio = f", {number(outcome.loss / expected)} times as much" if expected else ""
            yield "value-mismatch", f"With {case} it returned {number(outcome.loss)}{ratio} as what was differentiated."


def ignored(points: Sequence[Point], takes_constant: bool) -> Iterator[Finding]:
    """Counts without effect on D. A token count takes the place of c; that of the whole minibatch takes that of G."""
    if takes_constant and not any(varies(points, symbol) for symbol in ("c", "n", "n_b", "N")):
        yield "constant-ignored", _at_both_ends(points, "c")
    if not any(varies(points, symbol) for symbol in ("G", "N")):
        yield "steps-ignored", _at_both_ends(points, "G")


def returned_and_changed(outcomes: Sequence[Outcome]) -> Iterator[Finding]:
    """Graphs in what came back, and arguments that are not as they were given."""
    for outcome in outcomes:
        # Where no backward ran, the graph of the loss is what the caller needs.
        if "loss" in outcome.attached and arrived(outcome) is not None:
            yield "loss-attached", "The returned loss requires grad."
        names = [name for name in outcome.attached if name != "loss"]
        if names:
            yield "metadata-attached", f"These still have a graph: {', '.join(names)}."
        if outcome.changed:
            yield "mutates-input", f"After the call {' and '.join(outcome.changed)} had other values than before."


def earlier_gradient(probe: Probe, case: Case, first: Outcome, earlier: torch.Tensor) -> Iterator[Finding]:
    """Whether the new gradient is added to one that is there. The codes are told apart as `PROBLEMS` says."""
    outcome = probe(case, earlier=earlier)
    if outcome.error:
        yield "raises", f"With a gradient in .grad: {outcome.error}"
        return
    if first.accumulated and first.gradient is not arrived(first):
        yield "zeroes-grad", "Autograd added the gradient of the log-probs, and then it was cleared."
    elif not _alike(outcome.gradient, earlier + arrived(first), TOLERANCE):
        by_autograd = bool(outcome.accumulated) and _alike(outcome.gradient, outcome.accumulated[-1], TOLERANCE)
        if by_autograd:
            yield "zeroes-grad", "What was in .grad before the call was gone before autograd added to it."
        else:
            yield (
                "overwrites-grad",
                f".grad was {_sum(earlier)} in all, the step brings {_sum(arrived(first))}, "
                + (f"and afterwards it was {_sum(outcome.gradient)}."),
            )


def parameters(probe: Probe, case: Case, gradient: torch.Tensor) -> Iterator[Finding]:
    """Whether the gradient reaches what the log-probs were computed from. In a training loop they are no leaf."""
    outcome = probe(case, from_parameter=True)
    if outcome.error:
        yield "raises", f"With log-probs computed from parameters: {outcome.error}"
    elif not _alike(outcome.gradient, gradient, TOLERANCE):
        yield "no-backward", "It writes .grad of the log-probs itself; parameters behind them get no gradient."


def padding(points: Sequence[Point]) -> Iterator[Finding]:
    if varies(points, "T"):
        yield "padding-counted", f"{_at_both_ends(points, 'T')} Only the padding differs."


def empty_masks(calls: Calls, first: Outcome) -> Iterator[Finding]:
    """A microbatch, or one or two of its sequences, without response tokens. `first` is a call with some."""
    loss_was_finite = first.loss is not None and math.isfinite(first.loss)
    gradient_was_finite = bool(arrived(first).isfinite().all())
    for name, (_, outcome) in zip(EMPTY, calls, strict=True):
        gradients = [outcome.gradient, *outcome.accumulated]
        if outcome.error:
            yield "raises", f"With {name}: {outcome.error}"
        elif gradient_was_finite and any(g is not None and not g.isfinite().all() for g in gradients):
            yield "nan-on-empty-mask", f"With {name} the gradient is not finite."
        elif loss_was_finite and outcome.loss is not None and not math.isfinite(outcome.loss):
            yield "nan-on-empty-mask", f"With {name} the loss is {outcome.loss:g}."


def _alike(one: torch.Tensor | None, other: torch.Tensor | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=0, atol=tolerance * other.abs().nan_to_num().max().item(), equal_nan=True)


def _equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_SAME) or (math.isnan(one) and math.isnan(other))


def _at_both_ends(points: Sequence[Point], symbol: str) -> str:
    line = series(points, symbol)
    first, last = line[0], line[-1]
    changed = f"{number(last.value)} " if varies(points, symbol) else ""
    return (
        f"D = {number(first.value)} at {symbol} = {number(first.counts[symbol])} and {changed}at "
        f"{symbol} = {number(last.counts[symbol])}."
    )


def _sum(gradient: torch.Tensor | None) -> str:
    return "None" if gradient is None else number(gradient.sum().item())


def _text(loss: float | None) -> str:
    return "None" if loss is None else number(loss)
