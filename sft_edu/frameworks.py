"""What frameworks divide by: each one's loss, and where it can be read.

Each formula is a line of our own, written from the sources that stand beside it, as they were in 2026. It gets the
log-probs of the response tokens of one microbatch and the counts of `scaling.py`, and returns the scaled loss; the
gradients of all microbatches add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sft_edu.scaling import RULES

Loss = Callable[[torch.Tensor, Mapping[str, int]], torch.Tensor]
"""`loss(log_probs, counts)`: log-probs `[n]` of the response tokens of one microbatch; counts B, G, n and N; 0-dim."""

_GITHUB = "https://github.com"


@dataclass(frozen=True)
class Framework:
    """One framework: its loss, the rule that is the same denominator, or None, and where that was read.

    `denominator` is D in the symbols of `scaling.py`. `note` says what the formula leaves out.
    """

    name: str
    denominator: str
    rule: str | None
    loss: Loss
    sources: tuple[str, ...]
    note: str


def _sum_over_sequences(log_probs: torch.Tensor, counts: Mapping[str, int]) -> torch.Tensor:
    return -log_probs.sum() / counts["B"] / counts["G"]


def _mean_over_steps(log_probs: torch.Tensor, counts: Mapping[str, int]) -> torch.Tensor:
    return -log_probs.mean() / counts["G"]


def _sum_over_items(log_probs: torch.Tensor, counts: Mapping[str, int]) -> torch.Tensor:
    return -log_probs.sum() / counts["N"]


def _mean_times_tokens(log_probs: torch.Tensor, counts: Mapping[str, int]) -> torch.Tensor:
    return -log_probs.mean() * counts["n"] / counts["N"]


def _weighted_by_probability(log_probs: torch.Tensor, counts: Mapping[str, int]) -> torch.Tensor:
    return -(log_probs.exp().detach() * log_probs).sum() / counts["N"]


FRAMEWORKS = (
    Framework(
        "CS336, assignment 5",
        RULES["sequence_mean"].formula,
        "sequence_mean",
        _sum_over_sequences,
        (f"{_GITHUB}/stanford-cs336/assignment5-alignment/blob/main/tests/conftest.py",),
        "Our reading: the reference itself is not published. The stored numbers of its test, in which B = G = 2, "
        "agree. c is 1 here.",
    ),
    Framework(
        "HF Trainer to 10/2024",
        RULES["microbatch_token_mean"].formula,
        "microbatch_token_mean",
        _mean_over_steps,
        (
            "https://huggingface.co/blog/gradient_accumulation",
            f"{_GITHUB}/huggingface/transformers/issues/24725",
        ),
        "Still what the Trainer does with a model that does not take num_items_in_batch.",
    ),
    Framework(
        "HF Trainer since then",
        RULES["token_mean"].formula,
        "token_mean",
        _sum_over_items,
        (
            f"{_GITHUB}/huggingface/transformers/blob/v5.23.0/src/transformers/loss/loss_utils.py",
            f"{_GITHUB}/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py",
            f"{_GITHUB}/huggingface/transformers/pull/34191",
        ),
        "On several devices N is counted over all of them, and the loss is multiplied by their number.",
    ),
    Framework(
        "TRL SFTTrainer",
        RULES["token_mean"].formula,
        "token_mean",
        _sum_over_items,
        (
            f"{_GITHUB}/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py",
            f"{_GITHUB}/huggingface/trl/blob/v1.16.0/trl/trainer/sft_config.py",
        ),
        "With its default loss_type, nll. It takes num_items_in_batch from the HF Trainer.",
    ),
    Framework(
        "TRL SFTTrainer, dft",
        "N/p",
        None,
        _weighted_by_probability,
        (
            f"{_GITHUB}/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py",
            "https://huggingface.co/papers/2508.05629",
        ),
        "With loss_type dft. Another objective: each token weighs as much as its own probability p, held constant.",
    ),
    Framework(
        "torchtune",
        RULES["token_mean"].formula,
        "token_mean",
        _mean_times_tokens,
        (
            f"{_GITHUB}/pytorch/torchtune/blob/main/recipes/full_finetune_single_device.py",
            f"{_GITHUB}/pytorch/torchtune/pull/1875",
        ),
        "It multiplies each mean by n, and divides the accumulated gradient by N once, before it is clipped. Until "
        "October 2024 it was a mean of means.",
    ),
    Framework(
        "nanochat",
        RULES["microbatch_token_mean"].formula,
        "microbatch_token_mean",
        _mean_over_steps,
        (
            f"{_GITHUB}/karpathy/nanochat/blob/master/scripts/chat_sft.py",
            f"{_GITHUB}/karpathy/nanochat/blob/master/nanochat/gpt.py",
        ),
        "It packs many conversations into each microbatch, so that n differs less than in this minibatch.",
    ),
)
"""The frameworks in the order of the table."""
