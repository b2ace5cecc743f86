"""What a check says: right or not yet, the mistake by name, and the smallest case that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sft_edu.digits import compact


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether the answer is right, and what to do next. Printed, a few short lines.

    Attributes:
        passed: whether the answer is right.
        message: what was compared, or a hint.
        case: the smallest input that the answer gets wrong, with what came out, or what else shows the mistake.
        max_difference: between what came out in that case and what was expected; None where nothing was compared.
        mistake: a stable short code of the mistake, `other` where it is not a known one, "" where there is none.
    """

    passed: bool
    message: str
    case: str = ""
    max_difference: float | None = None
    mistake: str = ""

    def __repr__(self) -> str:
        lines = [f"{'Correct' if self.passed else 'Not yet'}. {self.message}"]
        if self.case:
            lines.append(f"Smallest failing case: {self.case}")
        if self.max_difference is not None:
            lines.append(f"Largest difference: {compact(self.max_difference)}")
        return "\n".join(lines)


NOT_STARTED = Verdict(False, "Replace the ... with your answer and run the cell again.", mistake="not-started")


def right(message: str) -> Verdict:
    """The answer passed."""
    return Verdict(True, message)


def wrong(mistake: str, hint: str, case: str = "", max_difference: float | None = None) -> Verdict:
    """The answer did not pass, and this is why."""
    return Verdict(False, hint, case, max_difference, mistake)


def numbers(value: torch.Tensor | float | list) -> str:
    """Numbers as a learner would write them: `[[0, -0.2500]]`."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return f"[{', '.join(map(numbers, value))}]"
    return compact(value)


def close(one: Any, other: Any, tolerance: float = 1e-5, absolute: float = 1e-9) -> bool:
    """Whether numbers agree, relative to the second. Different shapes do not agree, nor does NaN with anything."""
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=absolute)


def difference(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The largest absolute difference; None where the shapes differ."""
    return (one - other).abs().max().item() if one.shape == other.shape else None
