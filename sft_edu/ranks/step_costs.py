"""What one minibatch costs, and how the cost grows: operations and memory exactly, seconds by the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sft_edu.accumulate import accumulate
from sft_edu.memory import saved_bytes
from sft_edu.model import TinyLM
from sft_edu.one_thread import one_thread

_LEAST_SECONDS = 0.05  # of one timing


@dataclass(frozen=True)
class Size:
    """A minibatch of G microbatches, each of B sequences of T tokens, and V tokens of vocabulary."""

    microbatch_size: int = 2
    length: int = 32
    vocab_size: int = 259
    gradient_accumulation_steps: int = 2

    @property
    def tokens(self) -> int:
        return self.microbatch_size * self.length * self.gradient_accumulation_steps


@dataclass(frozen=True)
class StepCost:
    """Of one minibatch, forward and backward.

    `operations` counts those of the matrix products, `held` is the most bytes that were held for backward at once.
    """

    size: Size
    operations: int
    held: int

    @property
    def operations_per_token(self) -> float:
        return self.operations / self.size.tokens


def step_cost(size: Size, device: str | torch.device = "cpu") -> StepCost:
    """Count what a minibatch of that size costs a small model. The same on every run."""
    run, given = _minibatch(size, device)
    counter = FlopCounterMode(display=False)
    # The fast attention kernels of the CPU are not in the counter's books; the plain one is made of matrix products.
    with one_thread():
        with counter, sdpa_kernel(SDPBackend.MATH):
            run()
        held = saved_bytes(run, *given)
    return StepCost(size, counter.get_total_flops(), held)


def seconds_per_token(sizes: Sequence[Size], device: str | torch.device = "cpu", rounds: int = 5) -> list[float]:
    """The least time of several rounds for each size. Each round times all of them, one after the other."""
    runs = [_minibatch(size, device)[0] for size in sizes]
    with one_thread():
        repeats = [math.ceil(_LEAST_SECONDS / max(_seconds(run, 1, device), 1e-6)) for run in runs]
        timed = [[_seconds(*pair, device) for pair in zip(runs, repeats, strict=True)] for _ in range(rounds)]
    return [min(column) / size.tokens for column, size in zip(zip(*timed, strict=True), sizes, strict=True)]


def peak_allocated(size: Size, device: str | torch.device) -> int:
    """The most bytes that the allocator of a CUDA device had given out during one minibatch, less those before it."""
    run, _ = _minibatch(size, device)
    run()  # what is allocated once and kept
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def growth(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent k of the power law y ~ x^k that fits best, by least squares on the logarithms.

    0 is flat, 1 a straight line through 0, 2 a square. A straight line that does not go through 0 is between 0 and 1.

    Raises:
        ValueError: fewer than two points, or a number that is not positive.
    """
    if len(xs) != len(ys) or len(xs) < 2 or min(*xs, *ys) <= 0:
        raise ValueError(f"xs, ys: got {list(xs)}, {list(ys)}; expected two lists of at least two positive numbers")
    logs = [[math.log(value) for value in values] for values in (xs, ys)]
    mean_x, mean_y = (sum(values) / len(values) for values in logs)
    spread = sum((x - mean_x) ** 2 for x in logs[0])
    if not spread:
        raise ValueError(f"xs: got {list(xs)}; expected at least two different numbers")
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(*logs, strict=True)) / spread


def _minibatch(size: Size, device: str | torch.device) -> tuple[Callable[[], object], list]:
    """What runs the minibatch, and the model and batch, whose own memory does not count."""
    model = TinyLM(size.vocab_size, d_model=32, num_layers=2, num_heads=2, context_length=size.length).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab_size, (size.microbatch_size, size.length), generator=generator).to(device)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "response_mask": torch.ones_like(ids)}
    microbatches = [batch] * size.gradient_accumulation_steps
    return lambda: accumulate(model, microbatches), [model, batch]


def _seconds(run: Callable[[], object], repeats: int, device: str | torch.device) -> float:
    """Of one run, the mean of some."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: str | torch.device) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
