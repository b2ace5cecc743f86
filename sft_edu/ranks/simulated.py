"""W ranks in one process: who holds which microbatches, what each divides by, and what their average is.

No process is started and nothing travels. Autograd runs once for each microbatch, on the sum of -log p; what a rank
adds up, and what the average over the ranks is, are then sums of those gradients, because a gradient is linear in the
loss. `worker.py` does the same in processes, with PyTorch's engines; the two share the table of denominators and
nothing else, so agreement is evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from sft_edu.accumulate import Batch, full_batch_gradient
from sft_edu.digits import fixed
from sft_edu.log_probs import get_response_log_probs
from sft_edu.one_thread import one_thread


@dataclass(frozen=True)
class RankDenominator:
    """What a rank divides its sum of -log p by, before the gradients are averaged over the ranks.

    `formula` is D in the symbols n, the response tokens of this rank, N, those of all ranks, and W, the ranks.
    """

    name: str
    formula: str
    denominator: Callable[[int, int, int], float]
    says: str


_ALL = (
    RankDenominator("local", "n", lambda n, N, W: n, "its own tokens"),
    RankDenominator("local_times_world", "n·W", lambda n, N, W: n * W, "its own tokens times the ranks"),
    RankDenominator("global", "N", lambda n, N, W: N, "the tokens of all ranks"),
    RankDenominator("global_over_world", "N/W", lambda n, N, W: N / W, "the tokens of all ranks over the ranks"),
)

RANK_DENOMINATORS: Mapping[str, RankDenominator] = MappingProxyType({one.name: one for one in _ALL})
"""Every denominator by its name; the last is the right one where the engine averages over ranks. Read-only."""


@dataclass(frozen=True)
class RankShare:
    """What one rank holds and what it works out alone.

    `loss` is what it runs backward on, in nats over D, and `grad_norm` the length of its gradient before the average.
    """

    rank: int
    sequences: int
    num_tokens: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, eq=False)
class RanksResult:
    """The gradient after the average over the ranks, flat and in the order of `model.parameters()`, and the shares."""

    gradient: torch.Tensor = field(repr=False)
    shares: tuple[RankShare, ...]

    def __repr__(self) -> str:
        lines = ["rank  sequences  response tokens  loss      length of its gradient"]
        for share in self.shares:
            numbers = f"{share.sequences:<9}  {share.num_tokens:<15}  {fixed(share.loss):<8}"
            lines.append(f"{share.rank:<4}  {numbers}  {fixed(share.grad_norm)}")
        return "\n".join([*lines, f"length of their average: {fixed(self.gradient.norm().item())}"])


@dataclass(frozen=True, eq=False)
class MicrobatchSums:
    """For each of G microbatches, over its response tokens: the gradient of the sum of -log p `[G, P]`, that sum `[G]`
    and the number of tokens `[G]` (int64); and its sequences `[G]` (int64)."""

    gradients: torch.Tensor = field(repr=False)
    nll: torch.Tensor
    num_tokens: torch.Tensor
    sequences: torch.Tensor


def microbatch_sums(model: nn.Module, microbatches: Sequence[Batch]) -> MicrobatchSums:
    """Run plain autograd on each microbatch. No `.grad` is touched.

    Args:
        model: see `get_response_log_probs`.
        microbatches: G >= 1 of them, as `split_minibatch` makes them.

    Raises:
        TypeError, ValueError: see `full_batch_gradient`; or there is no microbatch.
    """
    if isinstance(microbatches, Mapping) or not microbatches:
        given = "a single batch" if microbatches else "none"
        raise ValueError(f"microbatches: got {given}; expected a list of at least one")
    masks = [microbatch["response_mask"] != 0 for microbatch in microbatches]
    with one_thread():
        gradients = [full_batch_gradient(model, microbatch, objective="sum") for microbatch in microbatches]
        nll = [_nll(model, *pair) for pair in zip(microbatches, masks, strict=True)]
    return MicrobatchSums(
        torch.stack(gradients),
        torch.stack(nll),
        torch.stack([mask.sum() for mask in masks]),
        torch.tensor([len(mask) for mask in masks]),
    )


def deal(sums: MicrobatchSums, world_size: int, denominator: str = "global_over_world") -> RanksResult:
    """Deal microbatches to W ranks like cards: rank r holds r, r + W, r + 2W, ...; then average over the ranks.

    A rank without response tokens has a loss and a gradient of 0. It still counts in the average.

    Args:
        sums: what `microbatch_sums` returned.
        world_size: W >= 1; with more ranks than microbatches, some hold none.
        denominator: one of `RANK_DENOMINATORS`.

    Raises:
        ValueError: the text names the argument, what was given and what is expected.
    """
    check_world_size(world_size)
    divide = check_denominator_name(denominator).denominator
    gradients, nll, num_tokens, sequences = (
        _dealt(values, world_size) for values in (sums.gradients, sums.nll, sums.num_tokens, sums.sequences)
    )
    total = max(int(num_tokens.sum()), 1)
    # At least 1: a rank without tokens divides 0 by it.
    divisors = torch.tensor([divide(max(n, 1), total, world_size) for n in num_tokens.tolist()], dtype=nll.dtype)
    gradients = gradients / divisors.unsqueeze(1)
    columns = (sequences, num_tokens, nll / divisors, gradients.norm(dim=1))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return RanksResult(gradients.mean(0), tuple(RankShare(rank, *row) for rank, row in enumerate(rows)))


def check_world_size(world_size: int) -> None:
    """Refuse what is no number of ranks."""
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size: got {world_size!r}; expected an integer of at least 1")


def check_denominator_name(denominator: str) -> RankDenominator:
    """The denominator of that name."""
    if denominator not in RANK_DENOMINATORS:
        raise ValueError(f"denominator: got {denominator!r}; expected one of {', '.join(RANK_DENOMINATORS)}")
    return RANK_DENOMINATORS[denominator]


def _dealt(values: torch.Tensor, world_size: int) -> torch.Tensor:
    """The sum for each rank `[W, ...]` of values of the microbatches `[G, ...]`."""
    ranks = torch.arange(len(values)) % world_size
    return values.new_zeros(world_size, *values.shape[1:]).index_add(0, ranks, values)


@torch.no_grad()
def _nll(model: nn.Module, microbatch: Batch, mask: torch.Tensor) -> torch.Tensor:
    log_probs = get_response_log_probs(model, microbatch["input_ids"], microbatch["labels"])["log_probs"]
    return -log_probs.masked_fill(~mask, 0.0).sum()
