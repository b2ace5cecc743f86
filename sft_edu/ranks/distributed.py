"""The same run on several ranks: PyTorch's own engine moves the gradients, and the gradient stays right.

Ranks only share the work. The G microbatches of an optimizer step are dealt to W ranks, rank r runs numbers r, r + W,
and so on, and every one is divided by what it is divided by in one process. So a config means the same on any number of
ranks, whether W divides G or not.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sft_edu.data.encode import Encoded, fingerprint
from sft_edu.global_state import random_state_kept
from sft_edu.log_probs import get_response_log_probs
from sft_edu.training.one_process import METRIC_SUMS, OneProcess, T


class Ranks(OneProcess):
    """One of several processes, each with the whole model: DistributedDataParallel.

    Needs an initialised process group; `ranks_from_environment` makes one. Every method is to be called on all ranks.
    """

    lockstep = True

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.layout = f"{self.world_size} rank{'s' * (self.world_size > 1)}"

    def agree(self, model: nn.Module, examples: Sequence[Encoded], given: Mapping[str, object]) -> None:
        parameters = {f"model.{name}": f"{list(p.shape)} {p.dtype}" for name, p in model.named_parameters()}
        everyone = self._gathered({"layout": self.layout, **given, "examples": fingerprint(examples), **parameters})
        for name in {name: None for one in everyone for name in one}:
            expected, *others = (one.get(name, "nothing") for one in everyone)
            for rank, value in enumerate(others, start=1):
                if value != expected:
                    raise ValueError(f"{name}: got {value} on rank {rank}; expected {expected}, as on rank 0")

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model)  # which gives all ranks the weights of the first
        rehearse(wrapped)
        return wrapped

    def share(self, microbatches: Sequence[list[Encoded]]) -> list[list[Encoded]]:
        last_round_filled = [*microbatches, *([[]] * (-len(microbatches) % self.world_size))]
        return last_round_filled[self.rank :: self.world_size]

    def gradients(self, wrapped: nn.Module, *, travel: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if travel else wrapped.no_sync()

    def weigh(self, log_probs: torch.Tensor) -> torch.Tensor:
        # Wrappers average over the ranks. As loss * W would, this makes a sum of it.
        log_probs.register_hook(lambda gradient: gradient * self.world_size)
        return log_probs

    def count(self, number: int) -> int:
        total = torch.tensor(number)
        dist.all_reduce(total)
        return int(total)

    def total(self, sums: Mapping[str, torch.Tensor], error: ValueError | None) -> dict[str, float]:
        # One message for both; all that is counted fits into float64.
        failed = [float(rank == self.rank and error is not None) for rank in range(self.world_size)]
        values = torch.tensor([*(float(sums.get(name, 0.0)) for name in METRIC_SUMS), *failed], dtype=torch.float64)
        dist.all_reduce(values)
        totals, failed = values[: len(METRIC_SUMS)].tolist(), values[len(METRIC_SUMS) :].tolist()
        if any(failed):
            texts = enumerate(self._gathered(str(error)))
            raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in texts if failed[rank])) from error
        return dict(zip(METRIC_SUMS, totals, strict=True))

    def first(self, work: Callable[[], T]) -> T:
        content = [b""]
        if self.rank == 0:
            buffer = io.BytesIO()
            torch.save(_outcome(work), buffer)  # pickle alone cannot read all tensors that it wrote
            content = [buffer.getvalue()]
        dist.broadcast_object_list(content)
        value, error = torch.load(io.BytesIO(content[0]), weights_only=False)
        if error is not None:
            raise error
        return value

    def any(self, flag: bool) -> bool:
        return self.count(int(flag)) > 0

    def note(self, steps: int) -> str:
        idle = self.world_size - steps
        return f", by {self.layout}" + f", {idle} of them without work: G is only {steps}" * (idle > 0)

    def state_dict(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        random = self._gathered(_random_state(model))
        state = self._whole({**super().state_dict(model, optimizer), "random_of_ranks": random})
        return state if self.rank == 0 else {}

    def load_state_dict(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, object]
    ) -> list[str]:
        differences = super().load_state_dict(model, optimizer, state)
        if not differences:
            _set_random_state(model, state["random_of_ranks"][self.rank])
        return differences

    def _whole(self, state: T) -> T:
        """The state with no tensor in it of which other ranks have a part."""
        return state

    def _gathered(self, value: object) -> list:
        """The value of every rank, in their order."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def rehearse(wrapped: nn.Module) -> None:
    """A forward and a backward that count for nothing, and after which those that count are all alike.

    The first forward finds out how the head can be run, by calls that all ranks have to make together. From the first
    backward DDP learns in which order gradients come, and adds them up in that order from then on: a run that goes on
    from a checkpoint must not do its first step otherwise than the run before did it.
    """
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(wrapped.parameters()).device)
    with random_state_kept():
        scored = get_response_log_probs(wrapped, ids, ids, response_mask=torch.zeros_like(ids))
        scored["log_probs"].sum().backward()
    wrapped.zero_grad()


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _random_state(model: nn.Module) -> list[torch.Tensor]:
    """Of the generators that dropout draws from, on the CPU and on the device of the model."""
    device = next(model.parameters()).device
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _set_random_state(model: nn.Module, states: Sequence[torch.Tensor]) -> None:
    device = next(model.parameters()).device
    torch.set_rng_state(states[0].cpu())
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1].cpu(), device)
