"""What an optimizer makes of a wrongly scaled gradient.

SGD takes the scale as a learning rate, AdamW divides it out again, and clipping compares it with a fixed number. All
functions are pure: gradients are flat tensors, and no optimizer and no parameter is involved. Computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sft_edu.accumulate import Comparison, compare


@dataclass(frozen=True)
class OptimizerView:
    """One gradient beside the reference, as three optimizers see it.

    `learning_rate_factor` is what SGD's learning rate is multiplied by, `adamw` the comparison of the first AdamW
    updates. `clips` and `reference_clips` say whose length is above `max_norm`, and `clipped` compares both after it.
    """

    learning_rate_factor: float
    adamw: Comparison
    clips: bool
    reference_clips: bool
    clipped: Comparison


def optimizer_view(
    gradient: torch.Tensor, reference: torch.Tensor, *, eps: float = 1e-8, max_norm: float = 1.0
) -> OptimizerView:
    """SGD, the first step of AdamW, and clipping, for a gradient and for the full batch's.

    Args:
        gradient: what a rule accumulated, any shape.
        reference: the full-batch gradient, of the same shape.
        eps: of AdamW, at least 0.
        max_norm: of clipping, above 0.

    Raises:
        ValueError: the shapes differ, or a number is out of range.
    """
    return OptimizerView(
        learning_rate_factor(gradient, reference),
        compare(first_adamw_update(gradient, eps), first_adamw_update(reference, eps)),
        clips(gradient, max_norm),
        clips(reference, max_norm),
        compare(clip(gradient, max_norm), clip(reference, max_norm)),
    )


def learning_rate_factor(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    """`g·r / r·r`: SGD with g moves along r as far as SGD with r moves at this multiple of its learning rate.

    It is exact where the directions agree. 1 for two zeros; NaN beside a reference of 0.
    """
    comparison = compare(gradient, reference)
    return comparison.ratio * comparison.cosine


def first_adamw_update(gradient: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """`g / (|g| + eps)`: AdamW's first update, per unit of learning rate and without weight decay, float64.

    At step 1 the bias-corrected moments are g and g². An element of g that is 0 gives 0.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2.
    """
    if not eps >= 0:
        raise ValueError(f"eps: got {eps!r}; expected a number of at least 0")
    gradient = _float64(gradient)
    return torch.where(gradient == 0, 0.0, gradient / (gradient.abs() + eps))


def clips(gradient: torch.Tensor, max_norm: float) -> bool:
    """Whether clipping at `max_norm` makes the gradient shorter."""
    return _clip_coefficient(_float64(gradient), max_norm) < 1


def clip(gradient: torch.Tensor, max_norm: float) -> torch.Tensor:
    """The gradient, at most `max_norm` long, in float64: what `torch.nn.utils.clip_grad_norm_` leaves."""
    gradient = _float64(gradient)
    return gradient * min(1.0, _clip_coefficient(gradient, max_norm))


def _clip_coefficient(gradient: torch.Tensor, max_norm: float) -> float:
    if not max_norm > 0:
        raise ValueError(f"max_norm: got {max_norm!r}; expected a number above 0")
    return max_norm / (gradient.norm().item() + 1e-6)  # torch adds the 1e-6


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()  # to the CPU first: some accelerators have no float64
