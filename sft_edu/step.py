"""One microbatch of supervised fine-tuning: masked sum, two divisions, backward."""

from __future__ import annotations

from typing import Any

import torch

from sft_edu import checks
from sft_edu.trace import Tap, no_tap


def masked_normalize(
    tensor: torch.Tensor,
    mask: torch.Tensor,
    dim: int | tuple[int, ...] | None = None,
    normalize_constant: float = 1.0,
) -> torch.Tensor:
    """Sum the elements where the mask is 1 and divide by a constant.

    Elements where the mask is 0 are not used at all: a NaN or an infinity there changes nothing. float16 and bfloat16
    are added up in float32, and the result is float32, because their own sums overflow or lose tokens.

    Args:
        tensor: floating point, any shape.
        mask: the same shape and device; bool, integer or float, with values 0 and 1.
        dim: the dimension or dimensions to sum over; all when None.
        normalize_constant: the positive number c to divide by.

    Returns:
        `sum over dim of tensor[mask == 1] / c`, without the summed dimensions. 0 where nothing is selected.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected. The values of a mask
            on an accelerator are not looked at.
    """
    checks.check_pair("tensor", tensor, "mask", mask)
    checks.check_dim(dim, tensor.ndim)
    constant = checks.check_constant(normalize_constant, _sum_dtype(tensor))
    if checks.values_are_read(tensor.device) and checks.mask_flags(mask):
        raise ValueError("mask: got values other than 0 and 1; expected 1 to select an element, 0 elsewhere")
    return _select(tensor, mask != 0).sum(dim, dtype=_sum_dtype(tensor)) / constant


def sft_microbatch_train_step(
    policy_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
    *,
    rule: str = "notes",
    minibatch_tokens: int | torch.Tensor | None = None,
    tap: Tap = no_tap,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the loss of one microbatch, scale it, and run backward.

    The gradient is added to `.grad`, as autograd always does. This function never zeroes a gradient and never calls an
    optimizer. A microbatch whose mask is all 0 contributes a loss and a gradient of exactly 0. A NaN or an infinity
    where the mask is 0 does not enter the loss, and gets a gradient of 0; where a model computed it, the chain rule may
    still make NaN of that 0 inside the model. float16 and bfloat16 are added up in float32.

    A mask of the right shape but with the wrong meaning, such as the transpose of a square one, cannot be recognised.

    Args:
        policy_log_probs: `[B, T]`, log p of each label under the policy, in nats; float16, bfloat16, float32 or
            float64, with gradient.
        response_mask: `[B, T]`, 1 for a response token and 0 for prompt or padding, on the same device; bool, integer
            or float.
        gradient_accumulation_steps: G >= 1, microbatches per optimizer step.
        normalize_constant: c > 0. The two rules by token count do not depend on it.
        rule: one of `RULES`, the denominator D. The default is the course notes' `c * G**2`.
        minibatch_tokens: N >= 1, response tokens in all microbatches of this optimizer step, over all ranks. Checked
            whenever given; only rule `token_mean` divides by it.
        tap: called as `tap(name, value)` with every intermediate value, must return the value; see `Trace`.

    Returns:
        `loss`, the scaled loss `-(sum over the mask) / D` that was differentiated, 0-dim and detached, and `metadata`,
        0-dim detached tensors: `num_tokens` (int64), `masked_sum` (the sum over the mask / c), `loss` (before the
        second division), `denominator` (D, in the dtype of the sum), and `value_flags` (0, or what
        `raise_for_bad_values` explains).

    Raises:
        TypeError, ValueError: an argument is unusable; `.grad` is as it was. On an accelerator, bad values raise later,
            in `raise_for_bad_values`; call it before the optimizer steps. Until then the gradient of that microbatch's
            log-probs is exactly 0.

    Warns:
        PositiveLogProbWarning: a log-prob under the mask is positive.

    Source:
        Stanford CS336, assignment 5 (alignment), `sft_microbatch_train_step`.

    Example:
        >>> log_probs = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], requires_grad=True)
        >>> mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
        >>> loss, metadata = sft_microbatch_train_step(log_probs, mask, gradient_accumulation_steps=2)
        >>> loss, metadata["num_tokens"], metadata["masked_sum"]
        (tensor(0.7000), tensor(7), tensor(-2.8000))
        >>> log_probs.grad
        tensor([[-0.2500, -0.2500,  0.0000, -0.2500],
                [-0.2500, -0.2500, -0.2500, -0.2500]])
    """
    checks.check_pair("policy_log_probs", policy_log_probs, "response_mask", response_mask)
    checks.check_log_probs(policy_log_probs)
    checks.check_tap(tap)
    scaling, dtype = checks.check_rule(rule), _sum_dtype(policy_log_probs)
    counts: dict[str, Any] = {
        "1": 1,
        "c": checks.check_constant(normalize_constant, dtype),
        "B": len(policy_log_probs),
        "G": checks.check_steps(gradient_accumulation_steps),
        "N": checks.check_minibatch_tokens(minibatch_tokens, scaling, policy_log_probs.device),
    }
    checks.check_gradient_range(scaling, counts, policy_log_probs.dtype)

    policy_log_probs = tap("policy_log_probs", policy_log_probs)
    mask = tap("response_mask", response_mask) != 0
    num_tokens = tap("num_tokens", mask.sum())
    # Token counts divide in the precision of the sum. A microbatch without tokens divides its sum of 0 by 1.
    counts |= {"n": num_tokens.clamp(min=1).to(dtype), "N": _as_float(counts["N"], dtype)}
    tap("scaling", (scaling, counts))
    first, second = scaling.divisors(counts)

    selected = _select(policy_log_probs, mask)
    masked_sum = tap("masked_sum", selected.sum(dtype=dtype) / counts["c"])
    # 0 - x is -x, except where x is 0: a microbatch without tokens has the loss 0, not the float -0.
    loss = tap("loss", (0 - masked_sum) / first)
    scaled_loss = tap("scaled_loss", loss / second)

    flags = checks.value_flags(response_mask, selected, scaled_loss, num_tokens, minibatch_tokens)
    _backward(scaled_loss, flags, response_mask, selected)
    metadata = {
        "num_tokens": num_tokens,
        "masked_sum": masked_sum.detach(),
        "loss": loss.detach(),
        "denominator": torch.zeros_like(loss, requires_grad=False) + scaling.denominator(counts),
        "value_flags": flags,
    }
    return tap("returned_loss", scaled_loss.detach()), metadata


def _backward(
    scaled_loss: torch.Tensor, flags: torch.Tensor, response_mask: torch.Tensor, selected: torch.Tensor
) -> None:
    """Raise for bad values before backward or, where nothing may be read, let them contribute exactly 0."""
    if checks.values_are_read(flags.device):
        checks.report(int(flags), mask=response_mask, selected=selected, stacklevel=3)
    else:
        scaled_loss = torch.where((flags & ~checks.POSITIVE) == 0, scaled_loss, 0)
    scaled_loss.backward()


def _select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # Not tensor * mask: 0 * -inf is NaN.
    return torch.where(mask, tensor, 0)


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _as_float(count: int | torch.Tensor | None, dtype: torch.dtype) -> int | torch.Tensor | None:
    # A count on an accelerator is not looked at. If it is 0, it must not turn the gradient 0 into the NaN 0/0.
    return count.to(dtype).clamp(min=1) if isinstance(count, torch.Tensor) else count
