"""The same bug under real optimizers: how far do the parameters move, and how far does the formula say?

The model is as small as a language model can be: a table of logits, one row for each token, whose entries say what
comes next. It is trained on eight sequences of very unequal lengths, whose response tokens are all that counts. A bug
is a wrong denominator, so it only changes the weights of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import torch

from sft_edu.accumulate import Comparison, compare, split_minibatch
from sft_edu.optimizer_view import clip, clips, first_adamw_update
from sft_edu.ragged import ragged_minibatch

OPTIMIZERS = ("SGD", "AdamW")
SEQUENCES = 8
STEPS = 50
"""How many steps a run has, unless told otherwise."""

HIDES = 0.05
"""An optimizer hides a bug if the parameters' change is off by less than this share of the right change."""

# Logits this far apart make some tokens unlikely, so that some gradients are tiny. A uniform table has none.
_SPREAD = 2.0
_EXACT = 1e-6  # of the formula: six digits


@dataclass(frozen=True)
class Bug:
    """A wrong denominator: what happened, D in the symbols of `scaling.py`, and its value for one microbatch.

    The right D is N. `rule` is the rule that is known for this bug, if one is.
    """

    says: str
    formula: str
    denominator: Callable[[Mapping[str, int]], float]
    rule: str | None = None


BUGS: Mapping[str, Bug] = MappingProxyType(
    {
        "G_twice": Bug("one G too many", "N·G", lambda counts: counts["N"] * counts["G"], "notes"),
        "no_G": Bug("one G too few", "N/G", lambda counts: counts["N"] / counts["G"]),
        "no_N": Bug("no N", "1", lambda counts: 1),
        "no_minus": Bug("minus sign forgotten", "-N", lambda counts: -counts["N"]),
        "mean_of_means": Bug("mean of means", "n·G", lambda counts: counts["n"] * counts["G"], "microbatch_token_mean"),
    }
)
"""Every bug by its name. Read-only."""


@dataclass(frozen=True, eq=False)
class Run:
    """What an optimizer did in K steps, in float64.

    `gradient` `[P]` is the first one, before clipping. `change` `[K + 1, P]` is how far the parameters were from the
    start after each number of steps, and `clipped` says in which steps clipping made the gradient shorter.
    """

    gradient: torch.Tensor = field(repr=False)
    change: torch.Tensor = field(repr=False)
    clipped: tuple[bool, ...]


@dataclass(frozen=True)
class Outcome:
    """One optimizer: how far the parameters got with a bug, beside how far they get without, measured and predicted.

    `right_clips` and `bug_clips` say how many of the steps were clipped; None where nothing is.
    """

    name: str
    measured: Comparison
    predicted: Comparison
    right_clips: int | None
    bug_clips: int | None

    @property
    def is_exact(self) -> bool:
        """Whether the formula, which is that of the first step, says what was measured."""
        ratio, cosine = self.predicted.ratio, self.predicted.cosine
        return abs(self.measured.ratio - ratio) < _EXACT * ratio and abs(self.measured.cosine - cosine) < _EXACT

    @property
    def hides(self) -> bool:
        """Whether the parameters end almost where they would without the bug."""
        return self.measured.relative_error < HIDES


@lru_cache(maxsize=1)
def vocabulary() -> torch.Tensor:
    """The token ids that the table has rows and columns for, `[V]`, ascending."""
    return torch.cat(_pairs(1)[0]).unique()


def pair_weights(bug: str | None, gradient_accumulation_steps: int) -> torch.Tensor:
    """The weight of each pair of a token and the next one, `[V, V]`: 1/D for each time it occurs.

    Args:
        bug: one of `BUGS`, or None for the right D, which is N.
        gradient_accumulation_steps: G, from 1 to 8.
    """
    microbatches = _pairs(gradient_accumulation_steps)
    minibatch_tokens = sum(len(following) for _, following in microbatches)
    weights = torch.zeros(len(vocabulary()), len(vocabulary()), dtype=torch.float64)
    for tokens, following in microbatches:
        counts = {"G": len(microbatches), "n": len(tokens), "N": minibatch_tokens}
        denominator = BUGS[bug].denominator(counts) if bug else minibatch_tokens
        places = tuple(torch.searchsorted(vocabulary(), ids) for ids in (tokens, following))
        weights.index_put_(places, torch.tensor(1 / denominator, dtype=torch.float64), accumulate=True)
    return weights


@torch.enable_grad()
def run_optimizer(
    weights: torch.Tensor,
    optimizer: str,
    *,
    learning_rate: float,
    eps: float = 1e-8,
    max_norm: float | None = None,
    steps: int = STEPS,
) -> Run:
    """Train the table with torch's own optimizer and, where a `max_norm` is given, with torch's own clipping.

    Args:
        weights: what `pair_weights` returns. The loss is `-(weights * log p).sum()`.
        optimizer: `SGD` or `AdamW`, without momentum or weight decay.
        learning_rate: above 0.
        eps: of AdamW; SGD has none.
        max_norm: the length at which the gradient is clipped; None for no clipping.
        steps: K.

    Raises:
        ValueError: no such optimizer, or torch refuses a number.
    """
    start = _start(len(weights))
    logits = start.clone().requires_grad_()
    stepper = _make(optimizer, logits, learning_rate, eps)
    changes, clipped, first = [torch.zeros_like(start)], [], None
    for _ in range(steps):
        stepper.zero_grad()
        _loss(logits, weights).backward()
        first = logits.grad.clone() if first is None else first
        clipped.append(max_norm is not None and clips(logits.grad, max_norm))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([logits], max_norm)
        stepper.step()
        changes.append(logits.detach() - start)
    return Run(first.flatten(), torch.stack(changes).flatten(1), tuple(clipped))


def predicted(
    gradient: torch.Tensor, reference: torch.Tensor, optimizer: str, *, eps: float = 1e-8, max_norm: float | None = None
) -> Comparison:
    """How the first step with one gradient compares with the first step with another: a formula, no optimizer runs.

    Args:
        gradient: with the bug, any shape.
        reference: without it, the same shape.
        optimizer: `SGD`, whose step is the gradient, or `AdamW`, whose first step is `g / (|g| + eps)`.
        eps: of AdamW.
        max_norm: both are clipped at this length first; None for no clipping.
    """
    both = [gradient, reference]
    if max_norm is not None:
        both = [clip(one, max_norm) for one in both]
    if optimizer == "AdamW":
        both = [first_adamw_update(one, eps) for one in both]
    return compare(*both)


def outcome(
    bug: Run, right: Run, optimizer: str, *, steps: int, eps: float = 1e-8, max_norm: float | None = None
) -> Outcome:
    """Hold two runs of the same optimizer with the same settings against each other, after some of their steps."""
    clips_something = max_norm is not None
    return Outcome(
        f"{optimizer} + clipping" if clips_something else optimizer,
        compare(bug.change[steps], right.change[steps]),
        predicted(bug.gradient, right.gradient, optimizer, eps=eps, max_norm=max_norm),
        sum(right.clipped[:steps]) if clips_something else None,
        sum(bug.clipped[:steps]) if clips_something else None,
    )


def _loss(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # Not log_softmax: it wakes other threads for each of these few numbers, and waits for them.
    return (weights * (logits.logsumexp(-1, keepdim=True) - logits)).sum()


def _make(optimizer: str, logits: torch.Tensor, learning_rate: float, eps: float) -> torch.optim.Optimizer:
    if optimizer == "SGD":
        return torch.optim.SGD([logits], lr=learning_rate)
    if optimizer == "AdamW":
        return torch.optim.AdamW([logits], lr=learning_rate, eps=eps, weight_decay=0.0)
    raise ValueError(f"optimizer: got {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")


def _start(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return _SPREAD * torch.randn(size, size, dtype=torch.float64, generator=generator)


@lru_cache(maxsize=SEQUENCES)
def _pairs(gradient_accumulation_steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each microbatch its response tokens `[n]`, each after the token before it, `[n]`."""
    microbatches = split_minibatch(ragged_minibatch(SEQUENCES, imbalance=1.0), gradient_accumulation_steps)
    masks = [microbatch["response_mask"] != 0 for microbatch in microbatches]
    return [
        (microbatch["input_ids"][mask], microbatch["labels"][mask])
        for microbatch, mask in zip(microbatches, masks, strict=True)
    ]
