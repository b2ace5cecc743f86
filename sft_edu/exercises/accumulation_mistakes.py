"""What a wrong accumulated gradient says about the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sft_edu.accumulate import Batch, compare, full_batch_gradient, split_minibatch
from sft_edu.audit.denominator import TOLERANCE
from sft_edu.model import TinyLM

Named = tuple[str, str, torch.Tensor]
"""A code, its hint, and the gradient that the mistake leads to."""

_SAME_DIRECTION = 1 - 1e-11


def gradient_problem(
    gradient: torch.Tensor, model: TinyLM, batch: Batch, sizes: Sequence[int]
) -> tuple[str, str] | None:
    """Code and hint for a wrong gradient, None for a right one."""
    microbatches = split_minibatch(batch, sizes=sizes)
    sums = torch.stack([full_batch_gradient(model, microbatch, objective="sum") for microbatch in microbatches])
    tokens = torch.tensor([[int(microbatch["response_mask"].sum())] for microbatch in microbatches])
    expected = sums.sum(0) / tokens.sum()
    if compare(gradient, expected).relative_error <= TOLERANCE:
        return None
    if not gradient.isfinite().all():
        return "not-finite", "The gradient is not finite. Look for a division by 0, or a logarithm of 0."
    known = [*_wrong_divisors(sums, tokens, torch.tensor(sizes).unsqueeze(1)), *_others(expected, model, batch)]
    for code, hint, value in known:
        if compare(gradient, value).relative_error <= TOLERANCE:
            return code, hint
    return _missing_microbatch(gradient, sums) or _by_direction(gradient, expected)


def _wrong_divisors(sums: torch.Tensor, tokens: torch.Tensor, sequences: torch.Tensor) -> list[Named]:
    """From the sums `[G, P]` and two counts `[G, 1]`."""
    steps, total, means = len(sums), sums.sum(0), (sums / tokens).sum(0)
    own_mean = "Each microbatch is divided by its own token count"
    right = "Divide by the response tokens of all microbatches"
    whole = "The response tokens of all microbatches are the whole denominator."
    return [
        ("mean-of-means", f"{own_mean}: a mean of means is not the mean. {right}.", means / steps),
        ("mean-of-means", f"{own_mean}, and by G twice. {right}, and by nothing else.", means / steps**2),
        ("sum-of-means", f"{own_mean}. {right}.", means),
        ("not-divided", f"The sum is not divided at all. {right}.", total),
        ("divided-by-g", f"The sum is divided by G alone. {right}.", total / steps),
        (
            "notes",
            f"The sum is divided by G twice, as in the course notes, and not by its tokens. {right}, once.",
            total / steps**2,
        ),
        ("sequence-mean", f"That is a mean over sequences. {right}.", total / sequences.sum()),
        (
            "microbatch-sequence-mean",
            f"Each microbatch is divided by its B, and by G. {right}.",
            (sums / sequences).sum(0) / steps,
        ),
        ("divided-by-g-too", f"The gradient is divided by G as well. {whole}", total / tokens.sum() / steps),
        ("divided-by-g-too", f"The gradient is divided by G twice as well. {whole}", total / tokens.sum() / steps**2),
    ]


def _others(expected: torch.Tensor, model: TinyLM, batch: Batch) -> list[Named]:
    mask = batch["response_mask"]
    unmasked = full_batch_gradient(model, {**batch, "response_mask": torch.ones_like(mask)})
    by_tokens = unmasked * mask.numel() / mask.sum()
    in_sum = "Tokens with mask 0 are in your sum, though not in your count. Use the response mask in both."
    sign = "The gradient has the wrong sign: this loop makes the responses less likely."
    return [
        ("wrong-sign", sign, -expected),
        (
            "backward-twice",
            "The gradient doubled: there is a factor of 2, or a second backward for each microbatch.",
            2 * expected,
        ),
        ("mask-ignored", "Tokens with mask 0 are in your loss. Use the response mask.", unmasked),
        ("mask-ignored", in_sum, by_tokens),
        *(("mask-shifted", _SHIFTED, _with_mask(model, batch, mask.roll(by, 1))) for by in (1, -1)),
    ]


_SHIFTED = "The response mask is one place off. It lies on the labels already: do not shift it again."


def _with_mask(model: TinyLM, batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    return full_batch_gradient(model, {**batch, "response_mask": mask})


def _missing_microbatch(gradient: torch.Tensor, sums: torch.Tensor) -> tuple[str, str] | None:
    """Code and hint where some microbatches are not in the gradient, however it is scaled."""
    last, first = "The last microbatch is missing", "The first microbatch is missing"
    left = "Only the last microbatch is left. Zero the gradient before the loop, not inside it."
    found = [
        ("zeroed-inside", left, sums[-1]),
        ("first-only", "Only the first microbatch is there. Run every one.", sums[0]),
        ("last-missing", f"{last}. An incomplete window counts too.", sums[:-1].sum(0)),
        ("first-missing", f"{first}. Zero the gradient before it, not after it.", sums[1:].sum(0)),
    ]
    return next(
        ((code, hint) for code, hint, value in found if compare(gradient, value).cosine > _SAME_DIRECTION), None
    )


def _by_direction(gradient: torch.Tensor, expected: torch.Tensor) -> tuple[str, str]:
    found = compare(gradient, expected)
    if found.cosine > _SAME_DIRECTION:
        return "wrong-scale", (
            f"The direction is right, but the gradient is {found.ratio:.4g} times as long as the full batch's. The "
            "check has a minibatch of its own: count its microbatches and its response tokens."
        )
    return "other", (
        f"The gradient is {found.relative_error:.0%} off the full batch's. Sum -log p over the response tokens of each "
        "microbatch, and divide by the response tokens of all microbatches."
    )
