"""From a model's logits to the log-probability of each label."""

from __future__ import annotations

from collections.abc import Callable

import torch


def compute_entropy(logits: torch.Tensor) -> torch.Tensor:
    """The entropy of the next-token distribution, in nats.

    Computed from log-softmax, which subtracts the largest logit first, so that logits of 1e4 and more neither overflow
    nor lose the answer. A logit of -inf is a token with probability 0, which adds nothing. float16 and bfloat16 are
    computed in float32.

    Args:
        logits: `[..., V]`, floating point, unnormalised.

    Returns:
        `-sum_v p_v log p_v`, `[...]`, from 0 to ln V; with gradient if the logits have one.

    Raises:
        TypeError: the logits are not a floating-point tensor with at least one dimension.
    """
    log_probs = _log_softmax(_check_logits(logits))
    # p is 0 where log p is -inf, but 0 * -inf is NaN.
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def get_response_log_probs(
    model: Callable[[torch.Tensor], object],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    return_token_entropy: bool = False,
) -> dict[str, torch.Tensor]:
    """The log-probability that the model gives to each label.

    One forward pass. Prompt and padding positions are scored too; the response mask leaves them out of the loss.

    Args:
        model: called as `model(input_ids)`; returns logits `[B, T, V]`, or an object whose `.logits` they are.
        input_ids: `[B, T]`, int64.
        labels: `[B, T]`, int64, from 0 to V - 1: the inputs shifted by one.
        return_token_entropy: also return the entropy at each position.

    Returns:
        `log_probs`, `[B, T]`, at most 0, with gradient, float32 for float16 and bfloat16 logits. On request
        `token_entropy`, `[B, T]`, detached: it is there to be logged, and would hold the logits in memory otherwise.

    Raises:
        TypeError: ids or labels are not integers, or the model returned something else than logits.
        ValueError: the shapes do not fit, or (looked at on the CPU alone) a label is outside the vocabulary.

    Source:
        Stanford CS336, assignment 5 (alignment), `get_response_log_probs`.
    """
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got {getattr(ids, 'dtype', type(ids).__name__)}; expected an int64 tensor [B, T]")
    if input_ids.ndim != 2 or labels.shape != input_ids.shape or not labels.numel():
        raise ValueError(
            f"input_ids and labels: got shapes {list(input_ids.shape)} and {list(labels.shape)}; expected [B, T] "
            "twice, with at least one token"
        )
    output = model(input_ids)
    logits = _check_logits(getattr(output, "logits", output))
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(f"model: got logits of shape {list(logits.shape)}; expected {[*labels.shape, 'V']}")
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < logits.shape[-1]:
        raise ValueError(
            f"labels: got values from {labels.min()} to {labels.max()}; expected 0 to {logits.shape[-1] - 1}. A label "
            "to leave out is a 0 in the response mask, not a special label."
        )
    log_probs = _log_softmax(logits).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    result = {"log_probs": log_probs}
    if return_token_entropy:
        with torch.no_grad():
            result["token_entropy"] = compute_entropy(logits)
    return result


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _check_logits(logits: object) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or not logits.ndim:
        raise TypeError(f"logits: got {getattr(logits, 'dtype', type(logits).__name__)}; expected floats [..., V]")
    return logits
