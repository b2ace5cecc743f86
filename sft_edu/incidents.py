"""Public incidents, rebuilt: each as a loop that was shipped and the loop that replaced it.

The loops are called as `loop(model, microbatches)` and leave the gradient of one optimizer step in `.grad`, as
`audit_accumulation` wants it. They are our own few lines, reduced to the mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sft_edu.accumulate import Batch
from sft_edu.audit.accumulation import audit_accumulation

STEPS = 4  # G, as configured


def neg_log_probs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """-log p of each label, `[B, T]`, in nats."""
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")


def gradient_left(loop: Callable, model: nn.Module, microbatches: Sequence[Batch]) -> torch.Tensor:
    """The gradient that a loop leaves in a copy of the model, flat."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loop(model, microbatches)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def mean_of_means(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    for batch in microbatches:
        loss = neg_log_probs(model, batch)[batch["response_mask"]].mean()
        (loss / len(microbatches)).backward()


def one_mean(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    num_tokens = sum(batch["response_mask"].sum() for batch in microbatches)
    for batch in microbatches:
        loss = neg_log_probs(model, batch)[batch["response_mask"]].sum()
        (loss / num_tokens).backward()


def mask_dropped(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    kept = [{name: batch[name] for name in ("input_ids", "labels")} for batch in microbatches]
    masks = [batch.get("response_mask", torch.ones_like(batch["labels"])) for batch in kept]
    num_tokens = sum(mask.sum() for mask in masks)
    for batch, mask in zip(kept, masks, strict=True):
        loss = (neg_log_probs(model, batch) * mask).sum()
        (loss / num_tokens).backward()


def mask_kept(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    names = ("input_ids", "labels", "response_mask")
    kept = [{name: batch[name] for name in names} for batch in microbatches]
    num_tokens = sum(batch["response_mask"].sum() for batch in kept)
    for batch in kept:
        loss = (neg_log_probs(model, batch) * batch["response_mask"]).sum()
        (loss / num_tokens).backward()


def configured_window(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    for batch in microbatches:
        loss = neg_log_probs(model, batch)[batch["response_mask"]].sum() / len(batch["labels"])
        (loss / STEPS).backward()


def actual_window(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    num_sequences = sum(len(batch["labels"]) for batch in microbatches)
    for batch in microbatches:
        loss = neg_log_probs(model, batch)[batch["response_mask"]].sum()
        (loss / num_sequences).backward()


def zeroed_each_time(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    num_tokens = sum(batch["response_mask"].sum() for batch in microbatches)
    for batch in microbatches:
        model.zero_grad()
        loss = neg_log_probs(model, batch)[batch["response_mask"]].sum()
        (loss / num_tokens).backward()


def zeroed_once(model: nn.Module, microbatches: Sequence[Batch]) -> None:
    model.zero_grad()
    one_mean(model, microbatches)


def pads_masked(tokens: torch.Tensor, prompt_lengths: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Which tokens are responses, `[B, T]`: no padding, and nothing of the prompt."""
    in_prompt = torch.arange(tokens.shape[1]) < prompt_lengths[:, None]
    return (tokens != pad_token_id) & ~in_prompt


def lengths_masked(tokens: torch.Tensor, prompt_lengths: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """The same, but the first padding token behind a response is its eos when both are one token."""
    is_text = tokens != pad_token_id
    lengths = torch.where(is_text, torch.arange(tokens.shape[1]) + 1, 0).amax(1, keepdim=True)
    positions = torch.arange(tokens.shape[1])
    return (positions <= lengths) & (positions >= prompt_lengths[:, None])


@dataclass(frozen=True)
class EosAudit:
    """How many of the responses are taught to end."""

    supervised: int
    responses: int

    @property
    def ok(self) -> bool:
        return self.supervised == self.responses

    def __repr__(self) -> str:
        return f"eos is supervised in {self.supervised} of {self.responses} responses."


def audit_eos(make_mask: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> EosAudit:
    """Count the responses whose eos is under the mask, where the tokenizer pads with eos.

    Args:
        make_mask: called as `make_mask(tokens, prompt_lengths, pad_token_id)`, with `tokens` `[B, T]`; returns the
            response mask on the tokens, `[B, T]`.
    """
    eos = 0
    tokens = torch.tensor([[5, 6, 7, 8, 9, eos], [5, 6, 7, eos, eos, eos], [5, 6, eos, eos, eos, eos]])
    ends = torch.tensor([5, 3, 2])
    mask = make_mask(tokens, torch.tensor([2, 1, 1]), eos)
    return EosAudit(int((mask[torch.arange(3), ends] != 0).sum()), len(tokens))


@dataclass(frozen=True)
class Incident:
    """What people saw, what was shipped, what replaced it, and how to tell them apart: `audit(broken)`.

    `also_likely` are causes of such a symptom too, and not the one here.
    """

    symptom: str
    cause: str
    also_likely: tuple[str, ...]
    broken: Callable
    fixed: Callable
    audit: Callable[[Callable], object]
    source: str

    @property
    def suspects(self) -> list[str]:
        """The cause among the others, by the alphabet, so that its place tells nothing."""
        return sorted((self.cause, *self.also_likely))


INCIDENTS: dict[str, Incident] = {
    "mean of means": Incident(
        symptom="The same 8 sequences give another loss curve with 8 microbatches of 1 than with 1 of 8.",
        cause="a mean of means: each microbatch is divided by its own token count",
        also_likely=(
            "a learning rate that is not divided by the number of microbatches",
            "an optimizer step after each microbatch",
            "rounding: float32 sums depend on their order",
        ),
        broken=mean_of_means,
        fixed=one_mean,
        audit=audit_accumulation,
        source="https://github.com/huggingface/transformers/pull/34191",
    ),
    "dropped mask": Incident(
        symptom="The loss falls as never before, and the model answers by repeating questions.",
        cause="a mask that was lost on the way, with a default of ones in its place",
        also_likely=(
            "a learning rate that is too high",
            "a padding token that is trained in place of eos",
            "responses that are in the data twice",
        ),
        broken=mask_dropped,
        fixed=mask_kept,
        audit=audit_accumulation,
        source="https://github.com/huggingface/trl/issues/3781",
    ),
    "partial window": Incident(
        symptom="The last optimizer step of each epoch is smaller than the others.",
        cause="a division by the configured G, where the window holds fewer microbatches",
        also_likely=(
            "a data set sorted by length, with the short responses last",
            "a gradient that is clipped more at the end of an epoch",
            "a learning rate that has decayed to almost nothing",
        ),
        broken=configured_window,
        fixed=actual_window,
        audit=audit_accumulation,
        source="https://github.com/huggingface/transformers/pull/39659",
    ),
    "zeroed gradients": Incident(
        symptom="Doubling G changes nothing but the time a step takes; the loss is as noisy as before.",
        cause="a zero_grad before each microbatch, so that only the last one counts",
        also_likely=(
            "a data set that is not shuffled, so that all microbatches are alike",
            "a division by G too many, which the optimizer hides",
            "the right behaviour: a mean does not depend on G",
        ),
        broken=zeroed_each_time,
        fixed=zeroed_once,
        audit=audit_accumulation,
        source="https://github.com/pytorch/torchtitan/pull/3575",
    ),
    "endless answers": Incident(
        symptom="The answers are right, and go on and on.",
        cause="padding that is eos too, so the eos of a response is masked with it",
        also_likely=(
            "a mask that sits one position too late",
            "a prompt that is trained as if it were a response",
            "a response that is cut off at the longest length",
        ),
        broken=pads_masked,
        fixed=lengths_masked,
        audit=audit_eos,
        source="https://github.com/huggingface/transformers/issues/23530",
    ),
}
"""The incidents by name, in the order in which the lesson meets them."""
