"""What weight does each token have in a measured gradient: which tokens are trained, and do they count alike?"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sft_edu.audit.denominator import TOLERANCE, number

_NEXT_TO_NOTHING = 1e-12  # of the largest gradient
_SMALLEST = 1e-100  # its powers, and those of its inverse, stay within float64


def trained_tokens(gradient: torch.Tensor) -> torch.Tensor:
    """Where a gradient `[B, T]` is not 0: bool `[B, T]`. NaN is not 0."""
    largest = gradient.nan_to_num(posinf=0, neginf=0).abs().max()
    return ~(gradient.abs() <= _NEXT_TO_NOTHING * largest)


def token_problem(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[str, str] | None:
    """A problem code and what was measured, if other tokens are trained than those under the mask.

    Args:
        pairs: mask bool `[B, T]` and finite gradient `[B, T]` of several calls.
    """
    seen = [(mask, gradient, trained_tokens(gradient)) for mask, gradient in pairs]
    leaking = [one for one in seen if (one[2] & ~one[0]).any()]
    if leaking:
        everything = all(trained.all() for _, _, trained in seen)
        alike = everything and all(_leaked_share(*one[:2]) >= 1 - TOLERANCE for one in leaking)
        return "mask-ignored" if alike else "prompt-tokens-trained", _leak(*leaking[0])
    missing = next(((mask, trained) for mask, _, trained in seen if (mask & ~trained).any()), None)
    if missing:
        mask, trained = missing
        return "uneven-weights", f"{int((mask & ~trained).sum())} of {int(mask.sum())} response tokens get no gradient."
    return None


def sequence_weights(gradient: torch.Tensor, mask: torch.Tensor) -> list[float | None] | str:
    """The weight that all trained tokens of a sequence share, for each sequence, or in words why there is none.

    Tokens outside the mask are looked at only where no token under it is trained. None for an untrained sequence.
    """
    trained = trained_tokens(gradient)
    used = trained & mask if (trained & mask).any() else trained
    weights = []
    for row, places in zip(gradient, used, strict=True):
        values = row[places]
        if not values.isfinite().all():
            return "The gradient is not finite."
        if not len(values):
            weights.append(None)
            continue
        low, high = values.min().item(), values.max().item()
        if high - low > TOLERANCE * max(abs(low), abs(high)):
            return f"Trained tokens of one sequence have gradients from {number(low)} to {number(high)}."
        if not _SMALLEST < abs(low) < 1 / _SMALLEST:
            return f"A gradient of {low:g} is too far from 1 to be measured."
        weights.append((low + high) / 2)
    return weights


def _leak(mask: torch.Tensor, gradient: torch.Tensor, trained: torch.Tensor) -> str:
    """How many tokens outside the mask are trained, of which kind, and a known mistake that explains it."""
    outside = trained & ~mask
    behind = mask.flip(-1).cumsum(-1).flip(-1) == 0
    before = mask.cumsum(-1) == 0
    kinds = {"prompt": before, "padding": behind, "gap": ~mask & ~before & ~behind}
    counts = [f"{int((outside & kind).sum())} of {int(kind.sum())} {name}" for name, kind in kinds.items()]
    text = f"A gradient reaches {', '.join(counts[:2])} tokens and {counts[2]} token in a response"
    share = _leaked_share(mask, gradient)
    if share < 1 - TOLERANCE:
        text += f", {number(share)} times that of a response token at most"
    return text + _explained(mask, trained)


def _leaked_share(mask: torch.Tensor, gradient: torch.Tensor) -> float:
    """The largest gradient outside the mask, in terms of the smallest under it in the same sequence.

    1 for a sequence in which no token under the mask is trained.
    """
    sizes = gradient.abs()
    inside = sizes.masked_fill(~(mask & trained_tokens(gradient)), torch.inf).amin(1)
    outside = sizes.masked_fill(mask, 0).amax(1)
    return torch.where(inside.isinf(), (outside > 0).double(), outside / inside).max().item()


def _explained(mask: torch.Tensor, trained: torch.Tensor) -> str:
    if torch.equal(trained, ~mask):
        return "; the mask is inverted."
    if torch.equal(trained[:, 1:], mask[:, :-1]):
        return "; the mask is one position too late."
    if torch.equal(trained[:, :-1], mask[:, 1:]):
        return "; the mask is one position too early."
    return "."
