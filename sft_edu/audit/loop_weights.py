"""With which weight does each sequence enter the gradient that a loop left, and do the data determine it?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sft_edu.audit.denominator import TOLERANCE, Point
from sft_edu.audit.loop_probe import LoopProbe, Run

_LEAST_DIRECTION = 1e-6  # relative to the longest: below, float64 gradients are one direction less
_MOST_TOKENS = 300  # whose gradients are taken one by one


class Weights(NamedTuple):
    """The weight of each sequence, next to nothing as 0, and the largest one of a prompt or padding relative to it.

    `leak` is 0 where no token outside the mask is trained, and 1 where the mask is ignored: then prompt and padding
    have the weight of their sequence. Where the gradients have too few directions, other weights of the sequences
    explain as much, and `determined` is False.
    """

    response: list[float]
    leak: float
    mask_is_ignored: bool
    determined: bool


def weights_of(probe: LoopProbe, run: Run) -> Weights | None:
    """None where no such weights explain the gradient."""
    rows, count = list(run.rows), len(run.rows)
    sums, outside = probe.sums(run.columns)[rows], probe.outside(run.columns).unflatten(0, (2, -1))[:, rows]
    for part, leak in ((sums, 0.0), (sums + outside.sum(0), 1.0)):
        found = _solve(part, run.gradient)
        if found is not None:
            return Weights(found[0], leak, leak == 1, found[1].all().item())
    found = _solve(torch.cat([sums, *outside]), run.gradient)
    if found is None:
        return None
    weights, determined = found
    response, others = weights[:count], weights[count:]
    largest = max(map(abs, response)) or max(map(abs, others))
    leak = max(abs(weight) / (abs(own) or largest) for weight, own in zip(others, response * 2, strict=True))
    return Weights(response, leak, False, determined[:count].all().item())


def points_of(run: Run, weights: Weights, tokens: str = "n") -> list[Point]:
    """D of each sequence that has a weight, with n, or `n_first` or `n_last` in its place."""
    pairs = zip(run.counts(), weights.response, strict=True)
    points = [Point(counts, 1 / abs(weight)) for counts, weight in pairs if weight]
    if tokens == "n":
        return points
    value = sum(run.lengths[: run.sizes[0]] if tokens == "n_first" else run.lengths[-run.sizes[-1] :])
    return [Point({s: x for s, x in counts.items() if s != "n"} | {tokens: value}, d) for counts, d in points]


def is_sum_over_tokens(probe: LoopProbe, run: Run) -> bool | None:
    """Whether any weights of single tokens explain the gradient. None where too many would, or there are too many."""
    tokens = sum(int(probe.mask[row].nonzero().max()) + 1 for row in run.rows)
    if tokens > _MOST_TOKENS or tokens + 2 * len(run.rows) >= run.gradient.numel():
        return None
    padding = probe.outside(probe.columns)[len(probe.lengths) :][list(run.rows)]
    return _solve(torch.cat([probe.token_gradients(run.rows), padding]), run.gradient) is not None


def _solve(sums: torch.Tensor, gradient: torch.Tensor) -> tuple[list[float], torch.Tensor] | None:
    """The weights with which `sums` `[k, parameters]` add up to the gradient, and which of them are determined."""
    lengths = sums.norm(dim=1).cpu()
    used = lengths > 0
    if not used.any():
        return None
    matrix = (sums.cpu()[used] / lengths[used].unsqueeze(1)).T
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = sizes > _LEAST_DIRECTION * sizes.max()
    left, sizes, rows = left[:, kept], sizes[kept], right[kept]
    solution = rows.T @ ((left.T @ gradient.cpu()) / sizes)
    if not (matrix @ solution - gradient.cpu()).norm() <= TOLERANCE * gradient.norm().cpu():
        return None
    weights, determined = torch.zeros(len(sums), dtype=torch.float64), torch.ones(len(sums), dtype=torch.bool)
    weights[used] = solution / lengths[used]
    weights[weights.abs() <= 10 * TOLERANCE * weights.abs().max()] = 0
    # A weight is determined if no direction that changes nothing in the sum changes it.
    determined[used] = (rows**2).sum(0) >= 1 - _LEAST_DIRECTION
    return weights.tolist(), determined
