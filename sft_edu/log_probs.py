"""From a model's logits to the log-probability of each label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sft_edu import checks
from sft_edu.head import logits_at


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
    return _entropy(_log_softmax(_check_logits(logits)))


def get_response_log_probs(
    model: Callable[[torch.Tensor], object],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    return_token_entropy: bool = False,
    response_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The log-probability that the model gives to each label.

    One forward pass. Without a mask prompt and padding positions are scored too, for the response mask to leave out of
    the loss.

    With a mask only response positions are scored, which takes less time and memory and changes no number: the
    projection onto the vocabulary is computed there alone, if the model allows it (see `logits_at`), and the
    log-softmax in any case. Elsewhere log-probs and entropy are exactly 0, and no gradient flows. A mask without a 1
    gives zeros through which backward can still run: every gradient is exactly 0.

    Args:
        model: called as `model(input_ids)`; returns logits `[B, T, V]`, or an object whose `.logits` they are.
        input_ids: `[B, T]`, int64.
        labels: `[B, T]`, int64, from 0 to V - 1: the inputs shifted by one. With a mask others may stand where it is 0.
        return_token_entropy: also return the entropy at each position.
        response_mask: `[B, T]`, 1 for a response token and 0 for prompt or padding; bool, integer or float. On the
            device of the labels or on the CPU: its ones are counted, and for that an accelerator has to be waited for.

    Returns:
        `log_probs`, `[B, T]`, at most 0, with gradient, float32 for float16 and bfloat16 logits. On request
        `token_entropy`, `[B, T]`, detached: it is there to be logged, and would hold the logits in memory otherwise.

    Raises:
        TypeError: ids or labels are not integers, the mask is of no such type, or the model returned something else
            than logits.
        ValueError: the shapes do not fit, or (looked at on the CPU alone) a label is outside the vocabulary or the mask
            holds something else than 0 and 1.

    Source:
        Stanford CS336, assignment 5 (alignment), `get_response_log_probs`.
    """
    _check_ids(input_ids, labels)
    if response_mask is not None:
        _check_mask(response_mask, labels)
        return _under_mask(model, input_ids, labels, return_token_entropy, response_mask)
    output = model(input_ids)
    logits = _check_model(getattr(output, "logits", output), labels)
    _check_labels(labels, logits)
    log_probs = _log_softmax(logits).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    result = {"log_probs": log_probs}
    if return_token_entropy:
        with torch.no_grad():
            result["token_entropy"] = compute_entropy(logits)
    return result


def _under_mask(
    model: Callable[[torch.Tensor], object],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    return_token_entropy: bool,
    response_mask: torch.Tensor,
) -> dict[str, torch.Tensor]:
    rows = response_mask.flatten().nonzero().squeeze(-1).to(labels.device)
    logits, only_rows = logits_at(model, input_ids, rows)
    if not only_rows:
        logits = _check_model(logits, labels).flatten(0, 1)
        logits = logits if len(rows) == len(logits) else logits.index_select(0, rows)
    labels_there = labels.flatten().index_select(0, rows).long()
    logits = logits.flatten(0, -2)  # [n, V]
    _check_labels(labels_there, logits)
    scored = _SelectedLogProbs.apply(logits, labels_there, return_token_entropy)
    names = ["log_probs", "token_entropy"][: len(scored)]
    return {
        name: values.new_zeros(labels.numel()).index_copy(0, rows, values).view(labels.shape)
        for name, values in zip(names, scored, strict=True)
    }


def log_probs_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-softmax of logits `[n, V]` at labels `[n]`, without a second tensor of the size of the logits."""
    return _SelectedLogProbs.apply(logits, labels, False)[0]


class _SelectedLogProbs(torch.autograd.Function):
    """The log-softmax at the labels, a few rows at a time.

    Nothing of the size of the logits is made in the forward pass, and in backward only their gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, return_token_entropy: bool
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(logits, labels)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probs, *entropy = (
            torch.empty(len(labels), dtype=dtype, device=labels.device) for _ in range(1 + return_token_entropy)
        )
        for rows in _chunks(logits):
            log_p = _log_softmax(logits[rows])
            log_probs[rows] = log_p.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
            if entropy:
                entropy[0][rows] = _entropy(log_p)
        ctx.mark_non_differentiable(*entropy)
        return log_probs, *entropy

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated itself (create_graph)
            given, probabilities = gradient.unsqueeze(-1), logits.softmax(-1, dtype=gradient.dtype)
            result = (probabilities * -given).scatter_add(-1, labels.unsqueeze(-1), given)
            return result.to(logits.dtype), None, None
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            # d log p[label] / d logits is 1 at the label, minus the probabilities.
            given, place = gradient[rows].unsqueeze(-1), result[rows]
            out = place if place.dtype == gradient.dtype else None
            probabilities = torch.softmax(logits[rows], -1, dtype=gradient.dtype, out=out)
            # A copy for half precision alone: elsewhere it is computed in its place.
            place.copy_(probabilities.mul_(-given).scatter_add_(-1, labels[rows].unsqueeze(-1), given))
        return result, None, None


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """A few rows at a time: 16 MiB of float32 on the CPU, more elsewhere, where each call costs more."""
    step = max(1, (2**22 if logits.device.type == "cpu" else 2**25) // logits.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _entropy(log_probs: torch.Tensor) -> torch.Tensor:
    # p is 0 where log p is -inf, but 0 * -inf is NaN.
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def _check_ids(input_ids: torch.Tensor, labels: torch.Tensor) -> None:
    for name, ids in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got {getattr(ids, 'dtype', type(ids).__name__)}; expected an int64 tensor [B, T]")
    if input_ids.ndim != 2 or labels.shape != input_ids.shape or not labels.numel():
        raise ValueError(
            f"input_ids and labels: got shapes {list(input_ids.shape)} and {list(labels.shape)}; expected [B, T] "
            "twice, with at least one token"
        )


def _check_mask(response_mask: object, labels: torch.Tensor) -> None:
    if not isinstance(response_mask, torch.Tensor) or response_mask.dtype not in checks.MASKS:
        given = getattr(response_mask, "dtype", type(response_mask).__name__)
        raise TypeError(f"response_mask: got {given}; expected a bool, integer or float tensor [B, T]")
    if response_mask.shape != labels.shape:
        raise ValueError(
            f"response_mask: got shape {list(response_mask.shape)}; expected {list(labels.shape)}, the shape of labels "
            "(a mask is never broadcast)"
        )
    if response_mask.device not in (labels.device, torch.device("cpu")):
        raise ValueError(
            f"response_mask: got device {response_mask.device}; expected {labels.device}, where labels is, or cpu"
        )
    if checks.values_are_read(response_mask.device):
        checks.report(int(checks.mask_flags(response_mask)), mask=response_mask)


def _check_model(logits: object, labels: torch.Tensor) -> torch.Tensor:
    logits = _check_logits(logits)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(f"model: got logits of shape {list(logits.shape)}; expected {[*labels.shape, 'V']}")
    return logits


def _check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    looked_at = labels.device.type == "cpu" and labels.numel()
    if looked_at and not 0 <= labels.min() <= labels.max() < logits.shape[-1]:
        raise ValueError(
            f"labels: got values from {labels.min()} to {labels.max()}; expected 0 to {logits.shape[-1] - 1}. A label "
            "to leave out is a 0 in the response mask, not a special label."
        )


def _check_logits(logits: object) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or not logits.ndim:
        raise TypeError(f"logits: got {getattr(logits, 'dtype', type(logits).__name__)}; expected floats [..., V]")
    return logits
