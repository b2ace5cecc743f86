"""The three training loops of the course notes, short enough to be read in a lesson.

They keep the notes' shape and mend what does not hold there: no forward pass whose result is unused, windows that are
minibatches and not counts of a running index, so that an incomplete one is stepped too, and `token_mean`, so that the
split does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from sft_edu.accumulate import Batch
from sft_edu.log_probs import get_response_log_probs
from sft_edu.step import sft_microbatch_train_step


def train_basic(model: nn.Module, minibatches: Iterable[Sequence[Batch]], optimizer: torch.optim.Optimizer) -> None:
    """Forward and backward for each microbatch, one optimizer step for each minibatch."""
    for microbatches in minibatches:
        minibatch_tokens = sum(int(batch["response_mask"].sum()) for batch in microbatches)
        for batch in microbatches:
            log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            sft_microbatch_train_step(
                log_probs,
                batch["response_mask"],
                len(microbatches),
                rule="token_mean",
                minibatch_tokens=minibatch_tokens,
            )
        optimizer.step()
        optimizer.zero_grad()


def train_with_logging(
    model: nn.Module, minibatches: Iterable[Sequence[Batch]], optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """The same; loss per token and tokens of each minibatch are kept. Sums first, then one division."""
    logs = []
    for microbatches in minibatches:
        minibatch_tokens = sum(int(batch["response_mask"].sum()) for batch in microbatches)
        log_prob = 0.0
        for batch in microbatches:
            log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            _, metadata = sft_microbatch_train_step(
                log_probs,
                batch["response_mask"],
                len(microbatches),
                rule="token_mean",
                minibatch_tokens=minibatch_tokens,
            )
            log_prob += metadata["masked_sum"].item()
        logs.append({"nll": -log_prob / minibatch_tokens, "num_tokens": minibatch_tokens})
        optimizer.step()
        optimizer.zero_grad()
    return logs


def train_with_clipping(
    model: nn.Module, minibatches: Iterable[Sequence[Batch]], optimizer: torch.optim.Optimizer, max_norm: float = 1.0
) -> list[float]:
    """The same; the gradient is clipped once, between the last backward and the optimizer step."""
    norms = []
    for microbatches in minibatches:
        minibatch_tokens = sum(int(batch["response_mask"].sum()) for batch in microbatches)
        for batch in microbatches:
            log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            sft_microbatch_train_step(
                log_probs,
                batch["response_mask"],
                len(microbatches),
                rule="token_mean",
                minibatch_tokens=minibatch_tokens,
            )
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return norms
