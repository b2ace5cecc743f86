"""The scaling rules: a rule is a denominator.

Every rule computes `scaled_loss = -(sum of log-probs where the mask is 1) / D`. Rules differ in D alone, and D alone
decides what the gradients of several microbatches add up to. D is a product of two counts and, in most rules, of the
constant c. The symbols are those of the lessons:

    c  normalize_constant
    B  sequences in this microbatch
    G  gradient_accumulation_steps, the microbatches per optimizer step
    n  response tokens in this microbatch
    N  response tokens in all G microbatches
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

Number = int | float | torch.Tensor
Counts = Mapping[str, Number]
"""The value of each symbol above, and `"1"`: 1. Tensors are 0-dim, so that nothing is read from an accelerator."""


@dataclass(frozen=True)
class Rule:
    """One way to scale the loss of a microbatch: by `first`, then by `second`, as the course notes do.

    A rule that does not use the constant takes it out of the masked sum again.

    Attributes:
        name: its identifier, the key in `RULES`.
        first: a symbol, what is divided by first.
        second: a symbol, what is divided by then.
        uses_constant: whether c is a factor of D.
        used_by: who divides by it.
        accumulates_to: what the gradients of all microbatches add up to.
    """

    name: str
    first: str
    second: str
    uses_constant: bool
    used_by: str
    accumulates_to: str

    @property
    def formula(self) -> str:
        """D in symbols, such as `c·G²`."""
        powers = Counter(["c"] * self.uses_constant + [self.first, self.second])
        return "·".join(symbol + "²" * (power == 2) for symbol, power in powers.items() if symbol != "1") or "1"

    @property
    def after_slash(self) -> str:
        """D as it is written after a `/`: `(c·G²)`, but `N`."""
        return f"({self.formula})" if "·" in self.formula else self.formula

    @property
    def needs_minibatch_tokens(self) -> bool:
        return "N" in (self.first, self.second)

    def divisors(self, counts: Counts) -> tuple[Number, Number]:
        """What to divide `-masked_sum` by, first and second, where `masked_sum` is already divided by c."""
        first = counts[self.first]
        return first if self.uses_constant else first / counts["c"], counts[self.second]

    def denominator(self, counts: Counts) -> Number:
        """D, so that `scaled_loss = -(masked sum, before dividing by c) / D`."""
        return (counts["c"] if self.uses_constant else 1) * counts[self.first] * counts[self.second]


_ALL = (
    Rule(
        "notes",
        first="G",
        second="G",
        uses_constant=True,
        used_by="the course notes",
        accumulates_to="(1/G) x the mean of the microbatch sums",
    ),
    Rule(
        "microbatch_mean",
        first="1",
        second="G",
        uses_constant=True,
        used_by="most tutorials on gradient accumulation",
        accumulates_to="the mean of the microbatch sums",
    ),
    Rule(
        "sequence_mean",
        first="B",
        second="G",
        uses_constant=True,
        used_by="the course's reference implementation",
        accumulates_to="the full-batch mean over sequences, while every microbatch has the same B",
    ),
    Rule(
        "microbatch_token_mean",
        first="n",
        second="G",
        uses_constant=False,
        used_by="the Hugging Face Trainer before October 2024",
        accumulates_to="a mean of token means: not the full batch when the token counts differ",
    ),
    Rule(
        "token_mean",
        first="N",
        second="1",
        uses_constant=False,
        used_by="the Hugging Face Trainer since October 2024",
        accumulates_to="exactly the full-batch mean over tokens",
    ),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _ALL})
"""Every rule by its name, in the order in which the lessons meet them. Read-only."""
