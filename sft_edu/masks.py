"""Response masks that people get wrong, made from a right one.

Each function takes a correct mask `[B, T]` over the labels, and returns a mask of the same shape: bool, on the same
device. The correct mask is the only thing they need, because the response ends at its last 1 and padding follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Preset:
    """A mask by name: how to make it from the correct one, and what it does to training, in one sentence."""

    name: str
    make: Callable[[torch.Tensor], torch.Tensor]
    consequence: str


def token_roles(response_mask: torch.Tensor) -> list[list[str]]:
    """`prompt`, `response` or `padding` for each label of a correct mask `[B, T]`."""
    padding = _padding(response_mask).tolist()
    return [
        ["response" if response else "padding" if padded else "prompt" for response, padded in zip(*row, strict=True)]
        for row in zip(response_mask.bool().tolist(), padding, strict=True)
    ]


def _padding(mask: torch.Tensor) -> torch.Tensor:
    """True after the last 1 of each row."""
    return mask.flip(-1).cumsum(-1).flip(-1) == 0


def _without_last(mask: torch.Tensor) -> torch.Tensor:
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) > 1)


_ALL = (
    Preset("correct", lambda mask: mask, "Every response token is trained, eos included."),
    Preset(
        "prompt leaked in",
        lambda mask: ~_padding(mask),
        "Prompt tokens are trained too: the model learns to write questions.",
    ),
    Preset(
        "one too late",
        lambda mask: pad(mask[:, :-1], (1, 0)),
        "The first response token is never trained; the token after the end is, where there is one.",
    ),
    Preset(
        "one too early",
        lambda mask: pad(mask[:, 1:], (0, 1)),
        "The last prompt token is trained, and eos never is: the model does not learn to stop.",
    ),
    Preset("eos missing", _without_last, "The response is trained without its eos: the model does not learn to stop."),
    Preset(
        "padding included",
        lambda mask: mask | _padding(mask),
        "Padding is trained as if it were an answer, where there is any.",
    ),
    Preset("all masked", torch.zeros_like, "Nothing is trained: loss and gradient are exactly 0."),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})
"""The correct mask and six wrong ones. Read-only."""
