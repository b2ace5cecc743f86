"""Check the loss of one rank of several, as the learner wrote it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import Judged, call, judged, reading, smallest
from sft_edu.exercises.verdict import Verdict, close, numbers, right, wrong

_NO_GRAPH = "Look for detach, item or no_grad."
_EXPECTED = "a tensor with one element, a float"


@dataclass(frozen=True)
class _Case:
    """The response masks of all ranks, one row of 0 and 1 each; the log-probs follow from them."""

    masks: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        return len(self.masks)

    @property
    def minibatch_tokens(self) -> int:
        return sum(map(sum, self.masks))

    def log_probs(self, rank: int) -> torch.Tensor:
        """`[1, T]`, all different, in float64; a leaf."""
        row = [-0.5 - 0.25 * place - 0.125 * rank for place in range(len(self.masks[rank]))]
        return torch.tensor([row], dtype=torch.float64, requires_grad=True)

    def mask(self, rank: int) -> torch.Tensor:
        return torch.tensor([self.masks[rank]])

    def expected(self, rank: int) -> torch.Tensor:
        """The gradient of the log-probs: each token that counts weighs W/N, and the average over W makes 1/N of it."""
        return -self.mask(rank).double() * self.world_size / self.minibatch_tokens

    def __str__(self) -> str:
        tokens = ", ".join(str(sum(mask)) for mask in self.masks)
        return f"{self.world_size} ranks with {tokens} response tokens"


_SMALL = (_Case(((1,), (1,))), _Case(((1, 0), (1, 1))), _Case(((1, 0, 0), (1, 1, 1))))
# No two ranks agree in their tokens, and no count is the number of ranks.
_TELLING = _Case(((0, 1, 1, 1, 1, 0), (1, 1, 0, 1, 1, 1), (0, 0, 0, 1, 1, 0)))
_EMPTY = _Case(((1, 1, 0), (0, 0, 0), (1, 1, 1)))


@remembered
@judged
def check_rank_loss(rank_loss: Callable[..., torch.Tensor]) -> Verdict:
    """Check the loss that each of W ranks runs backward on, where the engine averages the gradients over the ranks.

    Args:
        rank_loss: called as `rank_loss(log_probs, mask, minibatch_tokens, world_size)` with the log-probs and the mask
            of one rank, `[B, T]`, the response tokens of all ranks together, and the number of ranks. Returns the loss,
            0-dim, with its graph; the average over the ranks has to be the mean over all response tokens.
    """
    weights = [_weights(rank_loss, _TELLING, rank) for rank in range(_TELLING.world_size)]
    problem = _problem(weights)
    case, largest = smallest((*_SMALL, _TELLING), partial(_compare, rank_loss))
    if problem or case:
        return wrong(*(problem or ("other", "Some ranks are right, but not all.")), case, largest)
    return _empty_rank_problem(rank_loss) or right(
        f"{_TELLING}: their average is the mean over all {_TELLING.minibatch_tokens}, and an empty rank joins in."
    )


def _weights(rank_loss: Callable, case: _Case, rank: int, quiet: bool = False) -> torch.Tensor:
    """The gradient that the learner's loss gives the log-probs of one rank; ends the check if there is none."""
    log_probs, mask = case.log_probs(rank), case.mask(rank)
    before = log_probs.detach().clone(), mask.clone()
    loss = call(rank_loss, log_probs, mask, case.minibatch_tokens, case.world_size, quiet=quiet)
    if not isinstance(loss, torch.Tensor):
        raise Judged(wrong("not-a-tensor", f"Got {type(loss).__name__}; expected {_EXPECTED}."))
    with reading(_EXPECTED):
        if log_probs.grad is not None:
            hint = "Backward ran inside your function. Return the loss; the loop runs backward once."
            raise Judged(wrong("runs-backward", hint))
        if not (torch.equal(log_probs.detach(), before[0]) and torch.equal(mask, before[1])):
            raise Judged(wrong("mutates-input", "Your function changed its arguments. Work on copies."))
        if loss.numel() != 1:
            raise Judged(wrong("not-a-scalar", f"Got shape {list(loss.shape)}; sum over the tokens: one number."))
        if not loss.requires_grad:
            hint = "The loss has no graph, so backward cannot run."
            empty = "A rank without tokens runs backward too, or its peers wait: sum its log-probs under the mask."
            raise Judged(wrong("no-graph", f"{hint} {_NO_GRAPH if mask.any() else empty}"))
        [gradient] = torch.autograd.grad(loss.sum(), [log_probs], allow_unused=True)
        return torch.zeros_like(log_probs) if gradient is None else gradient


def _compare(rank_loss: Callable, case: _Case) -> tuple[str, float] | None:
    for rank in range(case.world_size):
        found, expected = _weights(rank_loss, case, rank, quiet=True), case.expected(rank)
        if not close(found, expected):
            average = [numbers(gradient / case.world_size) for gradient in (found, expected)]
            text = f"{case}: after the average, the gradient of rank {rank} is {average[0]}, expected {average[1]}."
            return text, (found - expected).abs().max().item() / case.world_size
    return None


def _empty_rank_problem(rank_loss: Callable) -> Verdict | None:
    """What a rank without response tokens does: its gradient is 0, and its loss still has a graph."""
    try:
        found = _weights(rank_loss, _EMPTY, 1, quiet=True)
    except Judged as end:
        return wrong(end.verdict.mistake, end.verdict.message, f"{_EMPTY}: rank 1 has none.")
    if found.any() or not found.isfinite().all():
        hint = "A rank without response tokens has to leave a gradient of 0. Look for a division by its own count."
        return wrong("empty-rank", hint, f"{_EMPTY}: rank 1 gets {numbers(found)}.")
    others = [
        rank for rank in (0, 2) if not close(_weights(rank_loss, _EMPTY, rank, quiet=True), _EMPTY.expected(rank))
    ]
    return wrong("other", f"One case is right, but not every one: {_EMPTY}.") if others else None


def _problem(weights: Sequence[torch.Tensor]) -> tuple[str, str] | None:
    """Code and hint for wrong gradients of the log-probs of every rank, None for right ones."""
    masks = [_TELLING.mask(rank).double() for rank in range(_TELLING.world_size)]
    world, total = _TELLING.world_size, _TELLING.minibatch_tokens
    own = [mask.sum().item() for mask in masks]
    if all(close(found, _TELLING.expected(rank)) for rank, found in enumerate(weights)):
        return None
    if not all(found.isfinite().all() for found in weights):
        return "not-finite", "The gradient is not finite. Look for a division by 0, or a logarithm of 0."
    if not any(found.any() for found in weights):
        return "no-gradient", "No gradient reaches the log-probs. Sum those where the mask is 1."
    own_count = "Each rank divides by its own tokens"
    whole = "Divide by minibatch_tokens, the response tokens of all ranks"
    if all(found[mask == 1].gt(0).all() for found, mask in zip(weights, masks, strict=True)):
        return "wrong-sign", "The sign is wrong: the loss is minus the sum of the log-probs."
    factors: list[tuple[str, str, Sequence[float]]] = [
        (
            "world-size-missing",
            "The gradient is W times too small: the engine divides by W when it averages, and nothing in the loss "
            "makes up for it.",
            [1 / total] * world,
        ),
        (
            "divided-by-world-size",
            "The gradient is W² times too small: the engine divides by W already, and so does your loss.",
            [1 / total / world] * world,
        ),
        ("world-size-twice", "world_size is in your loss once too often.", [world**2 / total] * world),
        ("local-count", f"{own_count}: a mean of means is not the mean. {whole}.", [1 / n for n in own]),
        (
            "local-count",
            f"{own_count}, and the factor W makes up for the average: a sum of means. {whole}.",
            [world / n for n in own],
        ),
        (
            "local-times-world",
            f"{own_count} times W, which is the count of all only if the ranks hold equally many. {whole}.",
            [1 / n / world for n in own],
        ),
        ("not-divided", f"The sum is not divided by tokens. {whole}.", [1.0] * world),
        ("not-divided", f"The sum is multiplied by W, and not divided by tokens. {whole}.", [float(world)] * world),
        ("not-divided", f"The sum is divided by W alone. {whole}.", [1 / world] * world),
    ]
    mean = f".mean() divides by a count of its own: of the positions, or of the tokens it is given. Sum. {whole}."
    by_positions = [mask.numel() for mask in masks]
    factors += [("mean", mean, [f / n for n in by_positions]) for f in (1.0, world, 1 / total, world / total)]
    factors += [("mean", mean, [f / n for n in own]) for f in (1 / total, world / total)]
    for code, hint, values in factors:
        if all(close(found, -mask * v) for found, mask, v in zip(weights, masks, values, strict=True)):
            return code, hint
    if any(found[mask == 0].any() for found, mask in zip(weights, masks, strict=True)):
        return "mask-ignored", "Tokens with mask 0 are in your loss. Sum those where the mask is 1."
    if all(close(-found.sum(), world * n / total) for found, n in zip(weights, own, strict=True)):
        return "uneven-weights", "The tokens of a rank weigh differently. Each of them weighs the same."
    return "other", (
        "Averaged over the ranks, each response token has to weigh 1/N, N being minibatch_tokens. What has the loss to "
        "be, if the average divides it by W?"
    )
