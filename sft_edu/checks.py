"""Bad input is refused here, before a gradient is touched.

Shapes, dtypes, devices and Python numbers are always checked: that needs no look at a tensor's values. Values are
looked at on the CPU at once. On an accelerator a look would wait for the queue once per microbatch, so the findings
stay there as `metadata["value_flags"]`, the log-probs of a bad microbatch get a gradient of exactly 0, and
`raise_for_bad_values` reads the flags when the caller wants, normally once per optimizer step.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from numbers import Real

import torch

from sft_edu.scaling import RULES, Counts, Rule

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)

BAD_MASK, NOT_FINITE, TOO_MANY_TOKENS, POSITIVE = 1, 2, 4, 8


class PositiveLogProbWarning(UserWarning):
    """Some log-probabilities are positive. No probability is above 1; the arithmetic goes on regardless.

    Silence it with `warnings.simplefilter("ignore", PositiveLogProbWarning)`.
    """


def check_pair(name: str, tensor: torch.Tensor, mask_name: str, mask: torch.Tensor) -> None:
    """Refuse a tensor and its mask unless they agree in shape and device and have usable dtypes."""
    for argument, value, dtypes in ((name, tensor, FLOATS), (mask_name, mask, MASKS)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{argument}: got {_kind(value)}; expected a torch.Tensor")
        if value.layout != torch.strided:
            raise TypeError(f"{argument}: got layout {value.layout}; expected a dense tensor")
        if value.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{argument}: got dtype {value.dtype}; expected one of {names}")
    if mask.shape != tensor.shape:
        raise ValueError(
            f"{mask_name}: got shape {list(mask.shape)}; expected {list(tensor.shape)}, the shape of {name} "
            "(a mask is never broadcast)"
        )
    if mask.device != tensor.device:
        raise ValueError(f"{mask_name}: got device {mask.device}; expected {tensor.device}, where {name} is")
    if mask.requires_grad:
        raise ValueError(f"{mask_name}: got a tensor that requires grad; expected a constant, use .detach()")


def check_log_probs(policy_log_probs: torch.Tensor) -> None:
    """Refuse log-probs that are not `[B, T]` or through which no gradient can flow."""
    if policy_log_probs.ndim != 2 or 0 in policy_log_probs.shape:
        raise ValueError(
            f"policy_log_probs: got shape {list(policy_log_probs.shape)}; expected [B, T] with at least one "
            "sequence and one token"
        )
    if not (policy_log_probs.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "policy_log_probs: got a tensor without gradient; expected requires_grad=True, or log-probs computed from "
            "parameters, outside torch.no_grad()"
        )


def check_steps(gradient_accumulation_steps: int) -> int:
    """G as a Python integer of at least 1. An int8 or a numpy integer becomes one, so that G*G cannot overflow."""
    return _count("gradient_accumulation_steps", gradient_accumulation_steps, "the microbatches per optimizer step")


def check_constant(normalize_constant: float, dtype: torch.dtype) -> float:
    """c as a Python float: above 0, and so far from both ends of `dtype` that counts and sums can be divided by it."""
    if isinstance(normalize_constant, bool) or not isinstance(normalize_constant, Real):
        raise TypeError(f"normalize_constant: got {_kind(normalize_constant)}; expected a Python number above 0")
    try:
        constant = float(normalize_constant)  # before comparing: a numpy.float32 rounds the limits to its own precision
    except OverflowError:
        constant = math.inf
    low, high = torch.finfo(dtype).smallest_normal ** 0.5, torch.finfo(dtype).max ** 0.5
    if not low <= constant <= high:  # refuses NaN too: it compares as False
        raise ValueError(
            f"normalize_constant: got {constant!r}; expected a number above 0 that {dtype} can safely divide by, "
            f"from {low:.3g} to {high:.3g}"
        )
    return constant


def check_rule(rule: str) -> Rule:
    """The rule of that name."""
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule: got {_kind(rule)}; expected one of {', '.join(RULES)}")
    return RULES[rule]


def check_minibatch_tokens(
    minibatch_tokens: int | torch.Tensor | None, rule: Rule, device: torch.device
) -> int | torch.Tensor | None:
    """N as a Python integer, or as the 0-dim integer tensor on `device` that an all-reduce leaves there."""
    name, meaning = "minibatch_tokens", "the response tokens of the whole minibatch"
    if minibatch_tokens is None:
        if rule.needs_minibatch_tokens:
            raise ValueError(f"{name}: got None; expected {meaning}, which rule {rule.name!r} divides by")
        return None
    if not isinstance(minibatch_tokens, torch.Tensor) or minibatch_tokens.device.type == "cpu":
        return _count(name, minibatch_tokens, meaning)
    if minibatch_tokens.ndim or minibatch_tokens.dtype not in (torch.int32, torch.int64):
        given = f"{minibatch_tokens.dtype} of shape {list(minibatch_tokens.shape)}"
        raise TypeError(f"{name}: got a tensor, {given}; expected an integer or a 0-dim integer tensor")
    if minibatch_tokens.device != device:
        raise ValueError(f"{name}: got device {minibatch_tokens.device}; expected {device}, where policy_log_probs is")
    return minibatch_tokens


def check_gradient_range(rule: Rule, counts: Counts, dtype: torch.dtype) -> None:
    """Refuse a denominator so large or so small that the gradient 1/D is 0 or infinite in `dtype`."""
    known: Counts = {symbol: count for symbol, count in counts.items() if not isinstance(count, torch.Tensor)}
    gradient = 1.0 / rule.denominator({"n": 1, "N": 1, **known})  # 1 is the least a token count can be
    limits = torch.finfo(dtype)
    if not limits.smallest_normal * limits.eps <= gradient <= limits.max:
        arguments = {"c": "normalize_constant", "G": "gradient_accumulation_steps", "N": "minibatch_tokens"}
        used = [symbol for symbol in arguments if symbol in rule.formula]
        raise ValueError(
            f"{' and '.join(arguments[symbol] for symbol in used)}: got {' and '.join(f'{known[s]:g}' for s in used)}, "
            f"under rule {rule.name!r} a gradient of {gradient:.3g} per token; expected one that {dtype} can hold"
        )


def check_dim(dim: int | tuple[int, ...] | None, ndim: int) -> None:
    """Refuse dimensions that a tensor of `ndim` dimensions does not have, or that come twice."""
    if dim is None:
        return
    dims = dim if isinstance(dim, tuple) else (dim,)
    if not all(type(one) is int for one in dims):
        raise TypeError(f"dim: got {_kind(dim)}; expected None, an integer or a tuple of integers")
    if not dims or not all(-ndim <= one < ndim for one in dims) or len({one % ndim for one in dims}) < len(dims):
        raise ValueError(f"dim: got {dim}; expected different dimensions of a tensor that has {ndim}")


def check_tap(tap: Callable) -> None:
    if not callable(tap):
        raise TypeError(f"tap: got {_kind(tap)}; expected a callable tap(name, value) that returns the value")


def values_are_read(device: torch.device) -> bool:
    """Whether values may be looked at: on the CPU alone that waits for nothing."""
    return device.type == "cpu"


def mask_flags(mask: torch.Tensor) -> torch.Tensor:
    """Flag values other than 0 and 1, NaN among them."""
    if mask.dtype == torch.bool:
        return torch.zeros((), dtype=torch.int64, device=mask.device)
    return BAD_MASK * _not_binary(mask).any()


def value_flags(
    response_mask: torch.Tensor,
    selected: torch.Tensor,
    scaled_loss: torch.Tensor,
    num_tokens: torch.Tensor,
    minibatch_tokens: int | torch.Tensor | None,
) -> torch.Tensor:
    """Flags for one microbatch, int64, 0-dim. `selected` holds the log-probs under the mask and 0 elsewhere."""
    flags = mask_flags(response_mask)
    flags = flags + NOT_FINITE * ~torch.isfinite(scaled_loss) + POSITIVE * (selected > 0).any()
    if minibatch_tokens is not None:
        flags = flags + TOO_MANY_TOKENS * (num_tokens.clamp(min=1) > minibatch_tokens)
    return flags


def report(
    flags: int,
    where: str = "",
    mask: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
    stacklevel: int = 2,
) -> None:
    """Raise for bad values and warn for positive log-probs. Given the tensors, name the first bad element."""
    if flags & BAD_MASK:
        found = _first(mask, _not_binary) or "values other than 0 and 1"
        raise ValueError(f"response_mask: got {found}{where}; expected 1 for a response token and 0 elsewhere")
    if flags & NOT_FINITE:
        found = _first(selected, lambda x: ~torch.isfinite(x)) or "values whose sum is not finite"
        raise ValueError(f"policy_log_probs: got {found}{where}; expected finite values where response_mask is 1")
    if flags & TOO_MANY_TOKENS:
        raise ValueError(
            f"minibatch_tokens: got 0 or fewer than this microbatch's own response tokens{where}; expected the "
            "response tokens of the whole minibatch"
        )
    if flags & POSITIVE:
        found = _first(selected, lambda x: x > 0) or "positive values where response_mask is 1"
        warnings.warn(
            f"policy_log_probs: got {found}{where}; a log-probability is never positive. The step computes it all the "
            "same.",
            PositiveLogProbWarning,
            stacklevel=stacklevel + 1,
        )


def raise_for_bad_values(*metadata: Mapping[str, torch.Tensor]) -> None:
    """Raise for bad values that steps found in their inputs, and warn for positive log-probabilities.

    On the CPU the step itself has done so. On an accelerator call this once per optimizer step, before
    `optimizer.step()`, with the metadata of all its microbatches: it reads from the device once.

    Args:
        metadata: what `sft_microbatch_train_step` returned, one or more.

    Raises:
        ValueError: a mask held values other than 0 and 1, a log-prob under the mask or a loss was not finite, or a
            microbatch had more response tokens than `minibatch_tokens`. The text names the argument.
    """
    if not metadata:
        raise TypeError("metadata: got nothing; expected the metadata of at least one microbatch")
    for one in metadata:
        if not isinstance(one, Mapping) or "value_flags" not in one:
            raise TypeError(f"metadata: got {_kind(one)}; expected the second result of sft_microbatch_train_step")
    flags = torch.stack([one["value_flags"] for one in metadata]).tolist()
    for index, flag in enumerate(flags):
        report(flag, where=f" in microbatch {index}" if len(flags) > 1 else "")


def _not_binary(mask: torch.Tensor) -> torch.Tensor:
    return (mask != 0) & (mask != 1)


def _first(tensor: torch.Tensor | None, is_bad: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The first bad element and its place, or nothing."""
    places = [] if tensor is None else is_bad(tensor).nonzero().tolist()
    return f"{tensor[tuple(places[0])].item():.6g} at {places[0]}" if tensor is not None and places else ""


def _count(name: str, value: int | torch.Tensor, meaning: str) -> int:
    is_bool = isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    try:
        count = None if is_bool else operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor that holds no data
        count = None
    if count is None:
        raise TypeError(f"{name}: got {_kind(value)}; expected an integer, {meaning}")
    if not 1 <= count <= 2**53:  # above it float64 cannot tell integers apart
        given = count if abs(count) < 2**64 else f"an integer of {count.bit_length()} bits"
        raise ValueError(f"{name}: got {given}; expected an integer from 1 to 2**53, {meaning}")
    return count


def _kind(value: object) -> str:
    """The value and its type, short enough for one line."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
