"""The microbatches that a step is probed with: small, ragged, in float64, and such that no two rules coincide.

One count is varied at a time, with at least four values beside the first case. The counts are those of `scaling.py`,
with two more: T, the positions of a row, and n_b, the response tokens of a sequence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

SYMBOLS = ("c", "n_b", "n", "N", "B", "T", "G")
"""Every count that a denominator may be a product of, in the order in which formulas name them."""

_LONGEST = 14
_FIRST = {"B": 5, "G": 3, "c": 1.75, "T": 27, "N": 211}
_SERIES = {
    "G": (4, 6, 7, 9),
    "c": (0.6, 1.25, 2.5, 3.2),
    "B": (3, 4, 6, 7),
    "T": (31, 37, 41, 47),
    "N": (101, 307, 401, 503),
}
_MORE_TOKENS = (4, 9, 15, 20)  # than in the first case
_JOINT = 6  # cases in which everything differs at once


@dataclass(frozen=True, eq=False)
class Case:
    """One call: log-probs float64 `[B, T]`, mask bool `[B, T]`, G, c and N.

    c is None where it is to be left out; `default_constant` is what it is then, None where that is not known.
    """

    log_probs: torch.Tensor
    mask: torch.Tensor
    steps: int
    constant: float | None
    minibatch_tokens: int
    default_constant: float | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Response tokens of each sequence, int64 `[B]`."""
        return self.mask.sum(1)

    def counts(self, row: int, trained_rows: bool = False) -> dict[str, float]:
        """The value of each symbol for one sequence. With `trained_rows`, B leaves out sequences without tokens."""
        rows, columns = self.mask.shape
        rows = int(self.mask.any(1).sum()) if trained_rows else rows
        return {
            "c": next((c for c in (self.constant, self.default_constant) if c is not None), 1.0),
            "n_b": int(self.lengths[row]),
            "n": int(self.mask.sum()),
            "N": self.minibatch_tokens,
            "B": rows,
            "T": columns,
            "G": self.steps,
        }

    def __str__(self) -> str:
        return self._text("B", "T", "n", "G", "c")

    @property
    def in_short(self) -> str:
        return self._text("B", "G", "c")

    def _text(self, *symbols: str) -> str:
        counts = self.counts(0)
        texts = {symbol: f"{symbol} = {counts[symbol]:g}" for symbol in symbols}
        is_unknown = self.constant is None and self.default_constant is None
        return ", ".join((texts | ({"c": "c left out"} if is_unknown else {})).values())


class Cases:
    """All cases of one seed. No global random number generator is read or changed.

    `first` is the one that the others differ from.
    """

    reference = 4
    """One sequence of each case has this many response tokens, so that all else can vary while n_b does not."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator("cpu").manual_seed(self._random.getrandbits(32))
        # Five different lengths, one of them the reference.
        others = self._random.sample([1, 2, 3, 5, 6, 7], _FIRST["B"] - 1)
        self._lengths = self._shuffled([self.reference, *others])
        self.first = self._case(self._lengths)

    def with_other_log_probs(self, case: Case) -> Case:
        """The same case with other values: the gradient of a sum does not depend on them."""
        return replace(case, log_probs=self._log_probs(case.mask.shape))

    def varied(self, has_constant: bool, has_minibatch_tokens: bool) -> Iterator[Case]:
        """Cases that differ from the first in one count alone, and then some in which all counts differ at once.

        A count that the step does not take is not varied. A sum or a maximum of counts shows in the last ones at the
        latest.
        """
        tokens = sum(self._lengths)
        for symbol, values in _SERIES.items():
            if (symbol == "c" and not has_constant) or (symbol == "N" and not has_minibatch_tokens):
                continue
            for value in values:
                lengths = self._lengths if symbol != "B" else self._ragged(value, tokens)
                yield self._case(lengths, **{symbol: value})
        for more in _MORE_TOKENS:
            yield self._case(self._ragged(_FIRST["B"], tokens + more))
        for _ in range(_JOINT):
            rows = self._random.randint(3, 8)
            yield self._case(
                self._ragged(rows, self._random.randint(rows + 9, 6 * rows)),
                T=self._random.randint(19, 40),
                N=self._random.randint(101, 997),
                G=self._random.randint(3, 11),
                c=round(self._random.uniform(0.4, 3.9), 2),
            )

    def full(self) -> Case:
        """Every position is a response, the first and the last too."""
        case = self._case(self._lengths)
        return replace(case, mask=torch.ones_like(case.mask))

    def edges(self, may_omit_constant: bool, default_constant: float | None = None) -> Iterator[Case]:
        """One sequence and G = 1; and c left to its default, 1 if none is known."""
        yield self._case([self.reference], G=1)
        if may_omit_constant:
            yield replace(self._case(self._lengths, c=None), default_constant=default_constant)

    def empty(self) -> Iterator[Case]:
        """A microbatch without response tokens, and two in which one and two sequences have none."""
        case = self._case(self._lengths)
        for rows in (len(case.mask), 1, 2):
            yield replace(case, mask=case.mask & (torch.arange(len(case.mask)) >= rows).unsqueeze(1))

    def earlier_gradient(self) -> torch.Tensor:
        """Something to be in `.grad` before the step runs, float64 `[B, T]`, nowhere 0."""
        return torch.rand(self.first.mask.shape, generator=self._generator, dtype=torch.float64) + 0.5

    def _case(self, lengths: list[int], **changed: float | None) -> Case:
        counts = _FIRST | changed
        mask = torch.zeros(len(lengths), counts["T"], dtype=torch.bool)
        for row, places in zip(mask, self._places(lengths, counts["T"]), strict=True):
            row[places] = True
        return Case(self._log_probs(mask.shape), mask, counts["G"], counts["c"], counts["N"])

    def _places(self, lengths: list[int], columns: int) -> Iterator[list[int]]:
        """The response positions of each row. Prompt before, padding after, and in the longest one a gap."""
        longest = lengths.index(max(lengths))
        for row, length in enumerate(lengths):
            span = length + (row == longest and length > 1)
            start = self._random.randint(1, columns - span - 1)
            gap = self._random.randint(start + 1, start + span - 2) if span > length else None
            yield [place for place in range(start, start + span) if place != gap]

    def _ragged(self, rows: int, tokens: int) -> list[int]:
        """Random lengths that add up to `tokens`, one of them the reference."""
        others = [1] * (rows - 1)
        for _ in range(tokens - self.reference - len(others)):
            shortest = [row for row, length in enumerate(others) if length < _LONGEST]
            others[self._random.choice(shortest)] += 1
        return self._shuffled([self.reference, *others])

    def _shuffled(self, lengths: list[int]) -> list[int]:
        return self._random.sample(lengths, len(lengths))

    def _log_probs(self, shape: torch.Size) -> torch.Tensor:
        """From -0.001 to -100: a weight that depends on log p, or a clamp, has something to show itself on."""
        exponents = torch.rand(shape, generator=self._generator, dtype=torch.float64) * 5 - 3
        return -(10**exponents)
