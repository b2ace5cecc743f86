"""What a run does in one way when it is alone and in another when other processes share its work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from sft_edu.data.encode import Encoded

T = TypeVar("T")
METRIC_SUMS = ("log_prob", "entropy", "masked_sum", "num_tokens")
"""What `Training` adds up over the microbatches of an optimizer step."""


class OneProcess:
    """A run that shares its work with nobody; `Ranks` offers the same for several processes.

    The microbatches of an optimizer step are run in rounds, in each of which every process runs at most one. Alone,
    each microbatch is a round.
    """

    rank = 0
    world_size = 1
    layout = "1 process"
    device: torch.device | None = None
    """Where its model belongs; anywhere when None."""
    lockstep = False
    """Whether others wait in their last backward for this process: then errors and stops have to be agreed on."""

    def agree(self, model: nn.Module, examples: Sequence[Encoded], given: Mapping[str, object]) -> None:
        """Refuse to begin where processes were given different models, examples or other values, by their names."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in place of `model`, so that gradients travel. The model's parameters may be replaced."""
        return model

    def share(self, microbatches: Sequence[list[Encoded]]) -> list[list[Encoded]]:
        """This process's microbatch in each round; an empty one where there is none left for it."""
        return list(microbatches)

    def gradients(self, wrapped: nn.Module, *, travel: bool) -> contextlib.AbstractContextManager:
        """Inside, backward adds to this process's gradients; if they `travel`, it ends with the sum of everybody's."""
        return contextlib.nullcontext()

    def weigh(self, log_probs: torch.Tensor) -> torch.Tensor:
        """The log-probs, with a gradient so long that the sum over processes is left of what a wrapper averages."""
        return log_probs

    def count(self, number: int) -> int:
        """A number of this process, added up over all."""
        return number

    def total(self, sums: Mapping[str, torch.Tensor], error: ValueError | None) -> dict[str, float]:
        """The `METRIC_SUMS` over all processes.

        Raises:
            ValueError: one of them has an `error`; all raise it.
        """
        if error is not None:
            raise error
        return {name: float(value) for name, value in sums.items()}

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on the first process, on all of them. It is not called on the others."""
        return work()

    def any(self, flag: bool) -> bool:
        """Whether a process says so."""
        return flag

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Shorten the gradient to `max_norm`, and return the length that it had.

        Raises:
            RuntimeError: it is not finite.
        """
        return float(clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True))

    def note(self, steps: int) -> str:
        """What to say of the processes behind the words on a run with so many microbatches in an optimizer step."""
        return ""

    def make_whole(self, model: nn.Module) -> None:
        """Give the model of the first process all its parameters, to be saved. Nothing can be trained after that."""

    def state_dict(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """`model` and `optimizer`, the same for any number of processes, and more that `load_state_dict` wants.

        Empty on all processes but the first.
        """
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "layout": self.layout}

    def load_state_dict(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, object]
    ) -> list[str]:
        """Take over what `state_dict` returned, perhaps to another number of processes.

        Returns:
            What keeps the run from going on bit for bit, a sentence each.
        """
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return self.differences(state)

    def differences(self, state: Mapping[str, object]) -> list[str]:
        """What `load_state_dict` returns."""
        before = state.get("layout", self.layout)
        if before == self.layout:
            return []
        return [f"the run was on {before} and is on {self.layout}, so that sums are added up in another order"]
