"""Many microbatches, one gradient: split a minibatch, accumulate, and compare with the full batch.

`full_batch_gradient` uses neither `step.py` nor `scaling.py`: two authors wrote the same mathematics, so agreement is
evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from sft_edu import checks
from sft_edu.log_probs import get_response_log_probs
from sft_edu.step import sft_microbatch_train_step

Batch = Mapping[str, torch.Tensor]
"""`input_ids`, `labels` and `response_mask`, each `[B, T]`: what `tokenize_prompt_and_output` returns."""

_COLUMNS = ("input_ids", "labels", "response_mask")


@dataclass(frozen=True, eq=False)
class Accumulation:
    """What G microbatches accumulated.

    `gradient` is flat: all parameters in the order of `model.parameters()`, 0 for a parameter that got none. `losses`
    `[G]` is what the steps returned, `num_tokens` `[G]` (int64) their response tokens. `running` holds `gradient` as it
    was after each microbatch, where that was asked for.
    """

    gradient: torch.Tensor = field(repr=False)
    losses: torch.Tensor
    num_tokens: torch.Tensor
    running: tuple[torch.Tensor, ...] = field(default=(), repr=False)

    @property
    def logged_loss(self) -> torch.Tensor:
        """The sum of the losses, 0-dim. Under `token_mean` it is the loss per token, in nats."""
        return self.losses.sum()


@dataclass(frozen=True)
class Comparison:
    """A gradient g beside a reference r: `|g| / |r|`, the cosine of their angle, and `|g - r| / |r|`."""

    ratio: float
    cosine: float
    relative_error: float


def split_minibatch(
    batch: Batch, gradient_accumulation_steps: int | None = None, *, sizes: Sequence[int] | None = None
) -> list[dict[str, torch.Tensor]]:
    """Split a minibatch into microbatches of consecutive sequences.

    Nothing is copied: a microbatch is a view, padded as the minibatch was.

    Args:
        batch: tensors whose first dimension is N, the number of sequences.
        gradient_accumulation_steps: G, from 1 to N. Where G does not divide N, the first microbatches have one
            sequence more than the last.
        sizes: the sequences in each microbatch, instead of G: integers of at least 1 that add up to N.

    Returns:
        G dicts with the keys of `batch`.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """
    num_sequences = _num_sequences(batch)
    if (gradient_accumulation_steps is None) == (sizes is None):
        raise TypeError("gradient_accumulation_steps and sizes: got both or neither; expected one of them")
    sizes = _equal_sizes(num_sequences, gradient_accumulation_steps) if sizes is None else list(sizes)  # type: ignore[arg-type]
    if not all(type(size) is int and size >= 1 for size in sizes) or sum(sizes) != num_sequences:
        raise ValueError(f"sizes: got {sizes}; expected integers of at least 1 that add up to {num_sequences}")
    parts = [tensor.split(sizes) for tensor in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


@torch.enable_grad()
def accumulate(
    model: nn.Module,
    microbatches: Sequence[Batch],
    *,
    rule: str = "token_mean",
    normalize_constant: float = 1.0,
    minibatch_tokens: int | torch.Tensor | None = None,
    on_microbatch: Callable[[int, torch.Tensor, dict[str, torch.Tensor]], object] | None = None,
    keep_running: bool = False,
) -> Accumulation:
    """Run the microbatch step on every microbatch and collect the gradient they leave together.

    The parameters are not changed and no optimizer is called. The `.grad` of every parameter is set aside meanwhile,
    and is the same tensor afterwards with the same values, also when something raises. A model with dropout has to be
    in eval mode to be compared with the full batch.

    Args:
        model: see `get_response_log_probs`. All its parameters are on one device; the microbatches are moved there.
        microbatches: G of them, as `split_minibatch` makes them.
        rule: one of `RULES`.
        normalize_constant: c > 0.
        minibatch_tokens: N; the response tokens of these microbatches when None. A minibatch without any has a
            gradient of 0.
        on_microbatch: called as `on_microbatch(index, loss, metadata)` after each backward, while `.grad` holds what
            has accumulated so far.
        keep_running: keep the gradient after each microbatch: G times the memory of the parameters.

    Returns:
        An `Accumulation` in the dtype and on the device of the model.

    Raises:
        TypeError, ValueError: see `sft_microbatch_train_step`.
    """
    parameters = _parameters(model)
    microbatches = _on_device(microbatches, parameters[0].device)
    if minibatch_tokens is None:
        minibatch_tokens = _count_tokens(microbatches)
    losses, metadata, running = [], [], []
    with _grad_set_aside(parameters):
        for index, microbatch in enumerate(microbatches):
            log_probs = get_response_log_probs(model, microbatch["input_ids"], microbatch["labels"])["log_probs"]
            loss, values = sft_microbatch_train_step(
                log_probs,
                microbatch["response_mask"],
                len(microbatches),
                normalize_constant,
                rule=rule,
                minibatch_tokens=minibatch_tokens,
            )
            losses.append(loss)
            metadata.append(values)
            if on_microbatch is not None:
                on_microbatch(index, loss, values)
            if keep_running:
                running.append(_flat(parameters))
        checks.raise_for_bad_values(*metadata)
        gradient = _flat(parameters)
    num_tokens = torch.stack([values["num_tokens"] for values in metadata])
    return Accumulation(gradient, torch.stack(losses), num_tokens, tuple(running))


@torch.enable_grad()
def full_batch_gradient(model: nn.Module, batch: Batch, *, objective: str = "token_mean") -> torch.Tensor:
    """The gradient of the whole minibatch at once, by plain autograd on -log p, in nats.

    Args:
        model: called as `model(input_ids)`; returns logits `[B, T, V]` or an object whose `.logits` they are.
        batch: the minibatch.
        objective: `token_mean` divides the sum of -log p over the response tokens by their number, `sequence_mean` by
            the number of sequences, `sum` by nothing. Without response tokens the gradient is 0.

    Returns:
        A flat tensor like `Accumulation.gradient`. No `.grad` is touched.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """
    parameters = _parameters(model)
    [batch] = _on_device([batch], parameters[0].device)
    is_response = batch["response_mask"] != 0
    divisors: dict[str, torch.Tensor | int] = {
        "token_mean": is_response.sum().clamp(min=1),
        "sequence_mean": len(is_response),
        "sum": 1,
    }
    if objective not in divisors:
        raise ValueError(f"objective: got {objective!r}; expected one of {', '.join(divisors)}")
    output = model(batch["input_ids"])
    logits = getattr(output, "logits", output)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    targets = batch["labels"].masked_fill(~is_response, -100).flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / divisors[objective]
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
    return _flat(parameters, [next(gradients) if parameter.requires_grad else None for parameter in parameters])


def compare(gradient: torch.Tensor, reference: torch.Tensor) -> Comparison:
    """Length, direction and distance of a gradient relative to a reference, computed in float64.

    Two zeros are equal: ratio 1, cosine 1, error 0. Beside a reference of 0, any other gradient has ratio and error
    infinity and cosine 0. A gradient of 0 beside another reference has ratio 0, cosine 0 and error 1. NaN gives NaN.

    Args:
        gradient: any shape, floating point, any device.
        reference: the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if gradient.shape != reference.shape:
        raise ValueError(f"gradient: got shape {list(gradient.shape)}; expected {list(reference.shape)}, as reference")
    # To the CPU first: some accelerators have no float64.
    one, other = (tensor.detach().cpu().double().flatten() for tensor in (gradient, reference))
    length, unit, distance = one.norm().item(), other.norm().item(), (one - other).norm().item()
    if unit == 0:
        return Comparison(1.0, 1.0, 0.0) if length == 0 else Comparison(length * torch.inf, 0.0, length * torch.inf)
    cosine = (one @ other / (length or 1.0) / unit).clamp(-1, 1).item()
    return Comparison(length / unit, cosine, distance / unit)


def _equal_sizes(num_sequences: int, gradient_accumulation_steps: int) -> list[int]:
    steps = checks.check_steps(gradient_accumulation_steps)
    if steps > num_sequences:
        raise ValueError(
            f"gradient_accumulation_steps: got {steps}; expected at most {num_sequences}, the sequences of the "
            "minibatch"
        )
    size, larger = divmod(num_sequences, steps)
    return [size + 1] * larger + [size] * (steps - larger)


def _num_sequences(batch: Batch) -> int:
    """The first dimension that all tensors of a batch share."""
    if not isinstance(batch, Mapping) or not all(isinstance(batch.get(name), torch.Tensor) for name in _COLUMNS):
        raise TypeError(f"batch: got {type(batch).__name__}; expected a dict with the tensors {', '.join(_COLUMNS)}")
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in batch.values()}
    if len(sizes) > 1 or sizes == {0}:
        shapes = {name: list(tensor.shape) for name, tensor in batch.items()}
        raise ValueError(f"batch: got {shapes}; expected one first dimension, at least one sequence")
    return sizes.pop()


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError("model: got no parameter with requires_grad=True; expected at least one")
    return parameters


def _on_device(microbatches: Sequence[Batch], device: torch.device) -> list[dict[str, torch.Tensor]]:
    if isinstance(microbatches, Mapping) or not microbatches:
        given = "a single batch" if microbatches else "none"
        raise ValueError(f"microbatches: got {given}; expected a list of at least one")
    for microbatch in microbatches:
        _num_sequences(microbatch)
    return [{name: tensor.to(device) for name, tensor in microbatch.items()} for microbatch in microbatches]


def _count_tokens(microbatches: Sequence[Batch]) -> torch.Tensor:
    """N, 0-dim and where the masks are, so that nothing is read from an accelerator; at least 1."""
    counts = [(microbatch["response_mask"] != 0).sum() for microbatch in microbatches]
    return torch.stack(counts).sum().clamp(min=1)


@contextmanager
def _grad_set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Every `.grad` is None inside, and afterwards the very tensor that it was."""
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def _flat(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None] | None = None) -> torch.Tensor:
    """The gradients one after the other, those in `.grad` when None are given; a copy."""
    gradients = [parameter.grad for parameter in parameters] if gradients is None else gradients
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().flatten() for p, g in pairs])
