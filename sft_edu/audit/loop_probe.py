"""Run somebody else's loop over microbatches on a float64 copy of a model, and weigh what it accumulated.

The gradients of the sequences are independent of each other, so an accumulated gradient has one weight for each of
them, and the weight is 1/D: the loop is measured as a single step is.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from sft_edu.accumulate import Batch, full_batch_gradient, split_minibatch
from sft_edu.audit.denominator import TOLERANCE, Point
from sft_edu.audit.words import describe
from sft_edu.global_state import plain_settings

SYMBOLS = ("n_b", "n", "N", "B", "M", "G")
"""The counts of a loop: those of `scaling.py` without c, and M, the sequences of the whole minibatch."""

Powers = Mapping[str, int]
_ALL_SPLITS_UP_TO = 8  # sequences: 128 splits


@dataclass(frozen=True, eq=False)
class Run:
    """One call of the loop: sequences, the sizes of their microbatches, and the gradient it left, flat, None if none.

    `lengths` are the response tokens of the sequences, 0 where the mask was cleared for this run.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    gradient: torch.Tensor | None = field(default=None, repr=False)
    error: str = ""
    changed: tuple[str, ...] = ()

    def counts(self) -> list[dict[str, int]]:
        """The value of each symbol for each sequence."""
        edges = itertools.pairwise([0, *itertools.accumulate(self.sizes)])
        tokens = [sum(self.lengths[start:end]) for start, end in edges]
        places = [index for index, size in enumerate(self.sizes) for _ in range(size)]
        common = {"N": sum(self.lengths), "M": len(self.rows), "G": len(self.sizes)}
        return [
            common | {"n_b": length, "n": tokens[place], "B": self.sizes[place]}
            for length, place in zip(self.lengths, places, strict=True)
        ]


class LoopProbe:
    """A loop, a float64 copy of the model in eval mode, and the gradient of each sequence under it."""

    def __init__(self, run_minibatch: Callable[..., object], model: nn.Module, minibatch: Batch) -> None:
        self._loop, self.runs = run_minibatch, 0
        parameter = next(iter(model.parameters()))
        device = "cpu" if parameter.device.type == "mps" else parameter.device  # mps has no float64
        self.model = copy.deepcopy(model).to(device, torch.float64).eval()
        self.batch = {name: tensor.to(device) for name, tensor in minibatch.items()}
        self.mask = self.batch["response_mask"] != 0
        self.lengths = tuple(self.mask.sum(1).tolist())

    def __call__(self, rows: Sequence[int], sizes: Sequence[int], cleared: Sequence[int] = ()) -> Run:
        """Run the loop once. The microbatches are copies; in the rows in `cleared`, places in `rows`, the mask is 0."""
        self.runs += 1
        given = {name: tensor[list(rows)] for name, tensor in self.batch.items()}
        given["response_mask"][list(cleared)] = 0
        lengths = [0 if place in cleared else self.lengths[row] for place, row in enumerate(rows)]
        before, model = {name: tensor.clone() for name, tensor in given.items()}, copy.deepcopy(self.model)
        error = ""
        with plain_settings():
            try:
                self._loop(model, split_minibatch(given, sizes=list(sizes)))
            except KeyboardInterrupt:
                raise
            except BaseException as raised:  # SystemExit too: no loop may end the audit
                error = describe(raised)
        changed = [name for name, tensor in given.items() if not torch.equal(tensor, before[name])]
        changed += [] if _same_parameters(model, self.model) else ["parameters"]
        gradient = _gradient(model)
        fits = gradient is not None and gradient.numel() == self.sums.shape[1]  # the loop may have added parameters
        return Run(tuple(rows), tuple(lengths), tuple(sizes), gradient if fits else None, error, tuple(changed))

    @cached_property
    def sums(self) -> torch.Tensor:
        """The gradient of the sum of -log p over the response tokens of each sequence, `[M, parameters]`."""
        return self._sums_over(self.mask)

    @cached_property
    def _sums_outside(self) -> torch.Tensor:
        """The same over the prompts, and then over the padding, `[2M, parameters]`."""
        padding = self.mask.flip(-1).cumsum(-1).flip(-1) == 0
        return torch.cat([self._sums_over(~self.mask & ~padding), self._sums_over(padding)])

    def _sums_over(self, mask: torch.Tensor) -> torch.Tensor:
        one_by_one = ({k: t[i : i + 1] for k, t in self.batch.items()} for i in range(len(mask)))
        return torch.stack(
            [
                full_batch_gradient(self.model, one | {"response_mask": mask[i : i + 1]}, objective="sum")
                for i, one in enumerate(one_by_one)
            ]
        )

    def predict(self, run: Run, powers: Powers) -> torch.Tensor:
        """The gradient that the run should have left, were D the product of these powers of the counts."""
        weights = [_weight(counts, powers) for counts in run.counts()]
        return torch.tensor(weights, dtype=torch.float64, device=self.sums.device) @ self.sums[list(run.rows)]

    def weights(self, run: Run) -> tuple[list[float], list[float]] | None:
        """The weight of each sequence, and those of its prompt and padding if any has one.

        None where no such weights explain the gradient: tokens of one sequence do not count alike.
        """
        rows = list(run.rows)
        outside = self._sums_outside.unflatten(0, (2, -1))[:, rows].flatten(0, 1)
        for sums in (self.sums[rows], torch.cat([self.sums[rows], outside])):
            found = _solve(sums, run.gradient)
            if found is not None:
                return found[: len(rows)], found[len(rows) :]
        return None

    def has_outside(self, run: Run) -> list[bool]:
        """Whether each sequence has a prompt, and then whether each has padding: the order of those weights."""
        there = (self._sums_outside != 0).any(1).unflatten(0, (2, -1))[:, list(run.rows)]
        return there.flatten().tolist()

    def points(self, run: Run) -> list[Point]:
        """D of each sequence that has a weight."""
        found = self.weights(run)
        pairs = zip(run.counts(), found[0] if found else [], strict=bool(found))
        return [Point(counts, 1 / abs(weight)) for counts, weight in pairs if weight]


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Ways to cut a row of sequences into microbatches, those with the fewest first.

    A row of up to 8 has `2**(total - 1)` ways, at most 128, and all of them come. Of a longer one come the whole, every
    single cut, and all splits into equal microbatches, the last one perhaps shorter.
    """
    if total > _ALL_SPLITS_UP_TO:
        yield from ((total,), *((cut, total - cut) for cut in range(1, total)))
        for size in range((total - 1) // 2, 0, -1):
            yield (size,) * (total // size) + ((total % size,) if total % size else ())
        return
    for cuts in range(total):
        for places in itertools.combinations(range(1, total), cuts):
            yield tuple(end - start for start, end in itertools.pairwise([0, *places, total]))


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers and gradients of the model are afterwards what they were; inside, `.grad` begins as None.

    A loop may use it by its global name in place of the copy that it is given.
    """
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        now = model.state_dict()
        with torch.no_grad():
            for name, tensor in state.items():
                if not _same_bits(now[name], tensor):
                    now[name].copy_(tensor)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one != one) & (other != other)).all())


def _same_parameters(model: nn.Module, pristine: nn.Module) -> bool:
    pairs = itertools.zip_longest(model.parameters(), pristine.parameters())
    return all(a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _gradient(model: nn.Module) -> torch.Tensor | None:
    """All gradients one after the other, None if none is other than 0."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([part.detach().to_dense().double().flatten() for part in parts])
    return flat if (flat != 0).any() else None


def _weight(counts: Mapping[str, int], powers: Powers) -> float:
    """1/D; 0 for a sequence without response tokens, which has a gradient of 0."""
    return 1 / math.prod(counts[symbol] ** power for symbol, power in powers.items()) if counts["n_b"] else 0.0


def _solve(sums: torch.Tensor, gradient: torch.Tensor) -> list[float] | None:
    """The weights with which `sums` `[k, parameters]` add up to the gradient; next to nothing becomes 0."""
    lengths = sums.norm(dim=1)
    used = lengths > 0
    matrix = (sums[used] / lengths[used].unsqueeze(1)).T.cpu()
    solution = torch.linalg.lstsq(matrix, gradient.cpu().unsqueeze(1), driver="gelsd").solution
    rest = (matrix @ solution).flatten() - gradient.cpu()
    if not rest.norm() <= TOLERANCE * gradient.norm():
        return None
    weights = torch.zeros(len(sums), dtype=torch.float64)
    weights[used.cpu()] = solution.flatten() / lengths[used].cpu()
    weights[weights.abs() <= 10 * TOLERANCE * weights.abs().max()] = 0
    return weights.tolist()
