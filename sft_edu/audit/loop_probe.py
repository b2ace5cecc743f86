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

import torch
from torch import nn

from sft_edu.accumulate import Batch, full_batch_gradient, split_minibatch
from sft_edu.audit.denominator import TOLERANCE
from sft_edu.audit.words import describe
from sft_edu.global_state import plain_settings

SYMBOLS = ("n_b", "n", "N", "B", "M", "T", "G")
"""The counts of a loop: those of a step without c, and M, the sequences of the whole minibatch."""

Powers = Mapping[str, int]
_ALL_SPLITS_UP_TO = 8  # sequences: 128 splits


@dataclass(frozen=True, eq=False)
class Run:
    """One call of the loop: sequences, the sizes of their microbatches, and the gradient it left, flat, None if none.

    `lengths` are the response tokens of the sequences, 0 where the mask was cleared for this run; `columns` is T.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    columns: int
    gradient: torch.Tensor | None = field(default=None, repr=False)
    error: str = ""
    changed: tuple[str, ...] = ()

    def counts(self, trained: str = "") -> list[dict[str, int]]:
        """The value of each symbol for each sequence.

        Where `trained` is "sequences", B and M leave out those without response tokens; where it is "microbatches", G
        leaves out those microbatches too.
        """
        edges = list(itertools.pairwise([0, *itertools.accumulate(self.sizes)]))
        parts = [self.lengths[start:end] for start, end in edges]
        sizes = [sum(map(bool, part)) if trained else len(part) for part in parts]
        steps = sum(map(bool, sizes)) if trained == "microbatches" else len(sizes)
        common = {"N": sum(self.lengths), "M": sum(sizes), "G": steps, "T": self.columns}
        return [
            common | {"n_b": length, "n": sum(part), "B": size}
            for part, size in zip(parts, sizes, strict=True)
            for length in part
        ]


class LoopProbe:
    """A loop, a float64 copy of the model in eval mode, and the gradient of each sequence under it."""

    def __init__(self, run_minibatch: Callable[..., object], model: nn.Module, minibatch: Batch) -> None:
        self._loop, self.runs = run_minibatch, 0
        self._known: dict[tuple[str, int], torch.Tensor] = {}
        parameter = next(iter(model.parameters()))
        device = "cpu" if parameter.device.type == "mps" else parameter.device  # mps has no float64
        self.model = copy.deepcopy(model).to(device, torch.float64).eval()
        self.batch = {name: tensor.to(device) for name, tensor in minibatch.items()}
        self.mask = self.batch["response_mask"] != 0
        self.columns = self.mask.shape[1]
        self.lengths = tuple(self.mask.sum(1).tolist())

    def __call__(
        self, rows: Sequence[int], sizes: Sequence[int], cleared: Sequence[int] = (), columns: int | None = None
    ) -> Run:
        """Run the loop once, with copies of the sequences.

        In the rows in `cleared`, places in `rows`, the mask is 0. Of each row the first `columns` are given.
        """
        self.runs += 1
        columns = self.columns if columns is None else columns
        given = {name: tensor[list(rows)] for name, tensor in self._first(columns).items()}
        given["response_mask"][list(cleared)] = 0
        lengths = [0 if place in cleared else self.lengths[row] for place, row in enumerate(rows)]
        before, model = {name: tensor.clone() for name, tensor in given.items()}, copy.deepcopy(self.model)
        microbatches = split_minibatch(given, sizes=list(sizes))
        entries, error = _entries(microbatches), ""
        with plain_settings():
            try:
                self._loop(model, microbatches)
            except KeyboardInterrupt:
                raise
            except BaseException as raised:  # SystemExit too: no loop may end the audit
                error = describe(raised)
        changed = [name for name, tensor in given.items() if not torch.equal(tensor, before[name])]
        changed += ["entries"] if _entries(microbatches) != entries else []
        gradient, is_same = self._left_in(model)
        changed += [] if is_same else ["parameters"]
        return Run(tuple(rows), tuple(lengths), tuple(sizes), columns, gradient, error, tuple(changed))

    def _left_in(self, model: nn.Module) -> tuple[torch.Tensor | None, bool]:
        """The gradient, None if there is none of these parameters, and whether the parameters are as they were."""
        try:
            gradient, is_same = _gradient(model), _same_parameters(model, self.model)
        except Exception:  # nothing can be read of a model that was taken apart, or moved to where no numbers are
            return None, False
        fits = gradient is not None and gradient.numel() == self.sums().shape[1]  # there may be more parameters
        return gradient if fits else None, is_same

    def sums(self, columns: int | None = None) -> torch.Tensor:
        """The gradient of the sum of -log p over the response tokens of each sequence, `[M, parameters]`."""
        return self._sums_over("response", columns or self.columns)

    def outside(self, columns: int) -> torch.Tensor:
        """The same over the prompts, and then over the padding, `[2M, parameters]`."""
        return torch.cat([self._sums_over("prompt", columns), self._sums_over("padding", columns)])

    def token_gradients(self, rows: Sequence[int]) -> torch.Tensor:
        """The gradient of -log p of each token that is no padding, `[tokens, parameters]`."""
        is_token = self.mask.flip(-1).cumsum(-1).flip(-1) > 0
        places = [(row, column) for row in rows for column in is_token[row].nonzero().flatten().tolist()]
        masks = [(row, torch.zeros_like(self.mask[row])) for row, _ in places]
        for (_, mask), (_, column) in zip(masks, places, strict=True):
            mask[column] = True
        return torch.stack([self._gradient_of(row, mask, self.columns) for row, mask in masks])

    def narrower(self, rows: Sequence[int]) -> int | None:
        """T without the columns behind the last response, None where that is no less or the gradients do not allow it.

        Without padding on the left, and under a model that does not look ahead, they are the same.
        """
        columns = int(self.mask[list(rows)].any(0).nonzero().max()) + 1
        if columns == self.columns:
            return None
        one, other = self.sums()[list(rows)], self.sums(columns)[list(rows)]
        return columns if (one - other).norm() <= TOLERANCE * one.norm() else None

    def predict(self, run: Run, powers: Powers, trained: str = "", rows: int | None = None) -> torch.Tensor:
        """The gradient that the run should have left, were D the product of these powers of `run.counts(trained)`.

        With `rows`, what was to be there after so many of its sequences.
        """
        weights = [_weight(counts, powers) for counts in run.counts(trained)][:rows]
        sums = self.sums(run.columns)
        return torch.tensor(weights, dtype=torch.float64, device=sums.device) @ sums[list(run.rows[:rows])]

    def _sums_over(self, which: str, columns: int) -> torch.Tensor:
        if (which, columns) not in self._known:
            mask = self.mask[:, :columns]
            padding = mask.flip(-1).cumsum(-1).flip(-1) == 0
            chosen = {"response": mask, "prompt": ~mask & ~padding, "padding": padding}[which]
            gradients = [self._gradient_of(row, one, columns) for row, one in enumerate(chosen)]
            self._known[which, columns] = torch.stack(gradients)
        return self._known[which, columns]

    def _gradient_of(self, row: int, mask: torch.Tensor, columns: int) -> torch.Tensor:
        one = {name: tensor[row : row + 1] for name, tensor in self._first(columns).items()}
        return full_batch_gradient(self.model, one | {"response_mask": mask.unsqueeze(0)}, objective="sum")

    def _first(self, columns: int) -> dict[str, torch.Tensor]:
        """The minibatch with its first columns alone."""
        wide = {name for name, tensor in self.batch.items() if tensor.shape[1:2] == (self.columns,)}
        return {name: tensor[:, :columns] if name in wide else tensor for name, tensor in self.batch.items()}


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
    state = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in _tensors(model):
                if name in state and not _same_bits(tensor, state[name]):
                    tensor.copy_(state[name])
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers. A `state_dict` may hold anything, and need not hold every buffer."""
    return [*model.named_parameters(), *model.named_buffers()]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one != one) & (other != other)).all())


def _same_parameters(model: nn.Module, pristine: nn.Module) -> bool:
    pairs = itertools.zip_longest(model.parameters(), pristine.parameters())
    return all(a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _entries(microbatches: Sequence[Batch]) -> list[object]:
    """Which tensors stand in which place, or whatever stands there now."""
    return [
        {name: id(tensor) for name, tensor in one.items()} if type(one) is dict else id(one) for one in microbatches
    ]


def _gradient(model: nn.Module) -> torch.Tensor | None:
    """All gradients one after the other, None if none is other than 0."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    flat = torch.cat([part.detach().to_dense().double().flatten() for part in parts])
    return flat if (flat != 0).any() else None


def _weight(counts: Mapping[str, int], powers: Powers) -> float:
    """1/D; 0 for a sequence without response tokens, which has a gradient of 0."""
    return 1 / math.prod(counts[symbol] ** power for symbol, power in powers.items()) if counts["n_b"] else 0.0
