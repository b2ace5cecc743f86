"""The questions that an audit of a step asks, one function each. Each yields problem codes with what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

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
_DECIMALS = (2, 3, 4, 5, 6)  # to which people round a loss for a log
_COARSE = (torch.bfloat16, torch.float16)


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
    """Of several calls with the same arguments. Where the losses alone differ, D can be measured all the same."""
    gradients, losses = [arrived(outcome) for outcome in outcomes], [outcome.loss for outcome in outcomes]
    if not all(_alike(gradient, gradients[0], _SAME) for gradient in gradients):
        sums = ["none" if gradient is None else number(gradient.sum().item()) for gradient in gradients]
        yield "not-deterministic", f"The same arguments gave gradients that add up to {', '.join(sums)}."
    elif not all(_equal(loss, losses[0]) for loss in losses):
        yield "value-mismatch", f"The same arguments gave one gradient, and the losses {', '.join(map(_text, losses))}."


def not_finite(case: Case, outcome: Outcome) -> Iterator[Finding]:
    gradient = arrived(outcome)
    if gradient is not None and not gradient.isfinite().all():
        yield "not-finite", f"With {case} the gradient is not finite."


def coarse_dtype(calls: Calls) -> str | None:
    """The dtype of 16 bits that all gradients are rounded to, if they are; then their last digits mean nothing."""
    gradients = [arrived(outcome) for _, outcome in calls if arrived(outcome) is not None]
    for dtype in _COARSE:
        if all(torch.equal(gradient.to(dtype).double(), gradient) for gradient in gradients):
            return str(dtype).removeprefix("torch.")
    return None


def missing_gradient(calls: Calls) -> Iterator[Finding]:
    for case, outcome in calls:
        if arrived(outcome) is None:
            yield "sequences-missing", f"With {case} no gradient arrived."


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


def losses(calls: Calls, again: Callable[[Case], tuple[Case, Outcome]]) -> Iterator[Finding]:
    """A loss that is linear in the log-probs is the sum of its gradient times the log-probs, and perhaps of more.

    So where it is another number, what counts is the difference to a call that differs in the log-probs alone, which
    is what `again` makes.
    """
    for case, outcome in calls:
        if outcome.loss is None:
            yield "value-mismatch", f"What is returned first is {outcome.returned}; a loss is one number."
            return
        if not any(_is_value(outcome.loss, terms) for terms in _terms(case, outcome)):
            other_case, other = again(case)
            if other.error or other.loss is None:
                continue
            change = outcome.loss - other.loss
            pairs = list(zip(_terms(case, outcome), _terms(other_case, other), strict=False))
            if any(_is_value(change, torch.cat([one.flatten(), -two.flatten()])) for one, two in pairs):
                continue
            yield "value-mismatch", f"With {case} it returned {_compared(outcome, change, *pairs[0])}"
            return


def _terms(case: Case, outcome: Outcome) -> list[torch.Tensor]:
    """The gradient times the log-probs: as it was left, and as autograd added it."""
    gradients = [g for g in (outcome.gradient, *outcome.accumulated[-1:]) if g is not None and (g != 0).any()]
    return [case.log_probs * gradient for gradient in gradients] or [torch.zeros(1, dtype=torch.float64)]


def _is_value(loss: float, terms: torch.Tensor) -> bool:
    """Whether the loss is the sum of the terms, also where it was rounded for a log: to decimals or to 16 bits."""
    expected, room = terms.sum().item(), _LOSS_TOLERANCE * terms.abs().sum().item()
    if not math.isfinite(loss):
        return False
    grids = [10.0**-places for places in _DECIMALS if round(loss, places) == loss]
    grids += [abs(loss) * torch.finfo(dtype).eps for dtype in _COARSE if torch.tensor(loss).to(dtype).item() == loss]
    return abs(loss - expected) <= max([room, *grids])


def _compared(outcome: Outcome, change: float, terms: torch.Tensor, other_terms: torch.Tensor) -> str:
    """The loss beside what was differentiated, in words."""
    expected, by_gradient = terms.sum().item(), terms.sum().item() - other_terms.sum().item()
    if expected and by_gradient and math.isclose(outcome.loss / expected, change / by_gradient, rel_tol=1e-4):
        ratio = number(outcome.loss / expected)
        return f"{number(outcome.loss)}, {ratio} times as much as what was differentiated."
    moved = "does not change" if abs(change) <= _SAME * abs(outcome.loss) else f"changes by {number(-change)}"
    return (
        f"{number(outcome.loss)}. With other log-probs that {moved}; going by the gradient it changes by "
        f"{number(-by_gradient)}."
    )


def is_scaled(calls: Calls) -> bool:
    """Whether the step left other multiples of what autograd added in one call than in another, as clipping does."""
    pairs = [(outcome.gradient, outcome.accumulated[-1]) for _, outcome in calls if outcome.accumulated]
    shares = [(left.norm() / added.norm()).item() for left, added in pairs if left is not None and added.any()]
    return bool(shares) and max(shares) - min(shares) > TOLERANCE * max(shares)


def ignored(points: Sequence[Point], takes: Callable[[str], bool]) -> Iterator[Finding]:
    """Counts without effect on D. A token count takes the place of c; that of the whole minibatch takes that of G."""
    if takes("constant") and not any(varies(points, symbol) for symbol in ("c", "n", "n_b", "N")):
        yield "constant-ignored", _at_both_ends(points, "c")
    if not any(varies(points, symbol) for symbol in ("G", "N")):
        none = "It takes no G, under any name that is known." if not takes("steps") else ""
        yield "steps-ignored", none or _at_both_ends(points, "G")


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
        return
    if _alike(outcome.gradient, earlier + arrived(first), TOLERANCE):
        return
    added = outcome.accumulated[-1] if outcome.accumulated else None
    if added is not None and _alike(outcome.gradient, added, TOLERANCE):
        yield "zeroes-grad", "What was in .grad before the call was gone before autograd added to it."
    elif added is not None and _alike(added, earlier + first.accumulated[-1], TOLERANCE):
        left = (
            f"Autograd added to what was there, {_sum(added)} in all, and then the step made {_sum(outcome.gradient)}"
        )
        yield "scales-grad", f"{left} of it: what had accumulated is scaled too, as when clipping inside the step."
    else:
        yield (
            "overwrites-grad",
            f".grad was {_sum(earlier)} in all, the step brings {_sum(arrived(first))}, and afterwards it was "
            f"{_sum(outcome.gradient)}.",
        )


def parameters(probe: Probe, case: Case, gradient: torch.Tensor) -> Iterator[Finding]:
    """Whether the gradient reaches what the log-probs were computed from. In a training loop they are no leaf."""
    outcome = probe(case, from_parameter=True)
    if outcome.error:
        yield "raises", f"With log-probs computed from parameters: {outcome.error}"
    elif not _alike(outcome.gradient, gradient, TOLERANCE):
        yield "no-backward", "The gradient stops at the log-probs; parameters behind them get no gradient."


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
