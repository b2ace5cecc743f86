"""What a wrong gradient of a microbatch step says about the step."""

from __future__ import annotations

import torch

from sft_edu import closed_form
from sft_edu.exercises.verdict import close
from sft_edu.scaling import RULES

CONSTANTS = (
    ("", "", 1),
    ("constant-ignored", "The normalize_constant is missing: divide the masked sum by it.", 0),
    ("constant-twice", "The normalize_constant divides twice.", 2),
    ("constant-multiplied", "The normalize_constant multiplies; it should divide.", -1),
)
"""Code, hint, and the exponent of c in the denominator."""

_INDEX_HINT = "Whole rows have a gradient, others none: an integer mask as an index picks rows. Compare it with == 1."


def denominators(mask: torch.Tensor, steps: int) -> list[tuple[str, str, float]]:
    """What people divide by besides c: code, hint and value. The right one, the notes', needs no hint."""
    sequences, tokens = len(mask), int(mask.sum())
    sums = "the course notes take the sum"
    return [
        ("", "", steps**2),
        ("divided-once", "It is divided by G once. The course notes divide by G twice.", steps),
        ("not-divided", "It is not divided by G. The course notes divide by G twice.", 1),
        ("divided-thrice", "It is divided by G once too often.", steps**3),
        (
            "g-to-the-g",
            "It is divided by G as often as there are microbatches: once per step in a loop. Twice is enough.",
            steps**steps,
        ),
        ("g-plus-two", "It is divided by G + 2. The second division is by G too.", steps + 2),
        ("twice-g", "It is divided by 2·G. The second division is by G too.", 2 * steps),
        ("backward-twice", "The gradient doubled: there is a factor of 2, or a second backward.", steps**2 / 2),
        (
            "sequence-mean",
            "It is divided by B and by G: that is the rule sequence_mean, not the one of the notes.",
            sequences * steps,
        ),
        ("batch-size", "It is divided by the batch size too; the course notes do not.", sequences * steps**2),
        (
            "microbatch-token-mean",
            "It is divided by the token count and by G: that is the rule microbatch_token_mean.",
            tokens * steps,
        ),
        ("token-count", f"It is divided by the token count too; {sums}.", tokens * steps**2),
        ("token-count", f"It is divided by the token count alone; {sums}, and divide by G twice.", tokens),
        ("position-mean", f"Each row is divided by its positions; {sums}, and divide by G twice.", mask.shape[1]),
        ("position-mean", f"Each row is divided by its positions, and by G once; {sums}.", mask.shape[1] * steps),
        ("position-mean", f"It is a mean over all positions; {sums}.", mask.numel() * steps**2),
        ("position-mean", f"It is a mean over all positions, divided by G once; {sums}.", mask.numel() * steps),
    ]


def gradient_problem(
    gradient: torch.Tensor | None, mask: torch.Tensor, rule: str, denominator: float, steps: int, constant: float
) -> tuple[str, str] | None:
    """Code and hint for a wrong gradient, None for a right one."""
    if gradient is None:
        return "no-backward", "No gradient arrived. Call .backward() on the scaled loss."
    if close(gradient, closed_form.grad_log_probs(mask, denominator, torch.float64)):
        return None
    if not (gradient[mask == 0] == 0).all():
        return _outside(gradient, mask)
    selected = gradient[mask == 1]
    if not selected.any():
        return "no-gradient", "The gradient is 0 everywhere. Was it zeroed, or the mask cleared?"
    if not close(selected, selected[0].expand_as(selected)):
        hint = "The gradient differs from token to token. Every token under the mask has the same weight in the sum."
        return "uneven-weights", hint
    measured = (-1 / selected[0]).item()
    if rule == "notes":
        return _by_denominator(measured, mask, steps, constant)
    if close(measured, -denominator):
        return "wrong-sign", "Negate the masked sum: this step makes the response less likely."
    return "wrong-denominator", f"The denominator is wrong. Accumulated, it has to be {RULES[rule].accumulates_to}."


def _outside(gradient: torch.Tensor, mask: torch.Tensor) -> tuple[str, str]:
    """Which tokens with mask 0 are trained."""
    trained = gradient != 0
    if torch.equal(trained, mask == 0):
        return (
            "mask-inverted",
            "The mask is inverted: tokens with mask 0 have a gradient, and those with mask 1 do not.",
        )
    if any(torch.equal(trained, _moved(mask, by)) for by in (1, -1)):
        return "mask-shifted", "Tokens with mask 0 have a gradient: the mask is one place off. It lies on the labels."
    if trained[:2].all() and not trained[2:].any():  # a mask of 0 and 1 as an index picks the rows 0 and 1
        return "mask-as-index", _INDEX_HINT
    found = "Every token has a gradient, also with mask 0" if trained.all() else "Tokens with mask 0 are trained"
    return "mask-ignored", f"{found}. Use the mask before you sum."


def _moved(mask: torch.Tensor, by: int) -> torch.Tensor:
    """The mask `by` places further right, cut off at the ends."""
    moved = mask.roll(by, 1).bool()
    moved[:, 0 if by > 0 else -1] = False
    return moved


def _by_denominator(measured: float, mask: torch.Tensor, steps: int, constant: float) -> tuple[str, str]:
    negate = "Negate the masked sum: this step makes the response less likely."
    for division, by_counts, value in denominators(mask, steps):
        for mistake, by_constant, power in CONSTANTS:
            for sign, negated, factor in (("", "", 1), ("wrong-sign", negate, -1)):
                if close(measured, factor * value * constant**power):
                    hint = " ".join(filter(None, (negated, by_counts, by_constant)))
                    return sign or division or mistake, hint
    return "other", "The gradient should be -1 / (c·G·G) where the mask is 1, and 0 elsewhere."
