"""Microbatch steps as people write them, right and wrong, each with what an audit has to find.

`python tests/wild_steps.py 200` audits every one of them with 200 seeds and prints the confusion matrix.
"""

import functools
import itertools
import math
import random
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from sft_edu import audit_step, masked_normalize, sft_microbatch_train_step

UNEVEN = "not a fixed weight per token"


class Wild(NamedTuple):
    """A step, the rule and formula to be found, and the problems in order."""

    step: Callable
    rule: str | None
    formula: str
    problems: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        return label(self.rule, self.formula, self.problems)


WILD: dict[str, Wild] = {}


def label(rule, formula, problems):
    """What an audit says first: the gravest problem, else the rule, else the formula."""
    return problems[0] if problems else rule or formula


def wild(rule, formula, *problems):
    def add(step):
        assert step.__name__ not in WILD
        WILD[step.__name__] = Wild(step, rule, formula, problems)
        return step

    return add


def finish(loss, **metadata):
    loss.backward()
    return loss.detach(), {name: value.detach() for name, value in metadata.items()}


# --- Right, each in its own way ---


@wild("notes", "c·G²")
def ours(*args, **kwargs):
    return sft_microbatch_train_step(*args, **kwargs)


@wild("notes", "c·G²")
def the_notes_line_by_line(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    num_tokens = response_mask.sum()
    masked_sum = masked_normalize(policy_log_probs, response_mask, None, normalize_constant)
    loss = -masked_sum / gradient_accumulation_steps
    return finish(loss / gradient_accumulation_steps, num_tokens=num_tokens, masked_sum=masked_sum)


@wild("notes", "c·G²")
def by_a_hand_written_gradient(log_probs, mask, steps, constant=1.0):
    log_probs.backward(gradient=-mask.to(log_probs.dtype) / steps / steps / constant)
    return -(log_probs.detach() * mask).sum() / steps**2 / constant, {}


@wild("notes", "c·G²")
def with_an_integer_mask(log_probs, mask, steps, constant=1.0):
    hidden = 1 - mask  # a bool mask raises here
    return finish(-log_probs.masked_fill(hidden == 1, 0).sum() / (constant * steps**2))


@wild("notes", "c·G²")
def with_a_float_mask(log_probs, mask, steps, constant=1.0):
    return finish(-torch.einsum("bt,bt->", log_probs, mask) / steps**2 / constant)


class NegativeMaskedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_probs, mask):
        ctx.save_for_backward(mask)
        return -(log_probs * mask).sum()

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return -gradient * mask, None


@wild("notes", "c·G²")
def with_its_own_autograd_function(log_probs, mask, steps, constant=1.0):
    return finish(NegativeMaskedSum.apply(log_probs, mask) / (steps * steps) / constant)


@wild("notes", "G²")
def without_the_constant(log_probs, mask, steps):
    return finish(-log_probs[mask].sum() / steps**2)


@wild("microbatch_mean", "c·G")
def by_position_only(log_probs, mask, steps, constant, /):
    return finish(-torch.masked_select(log_probs, mask).sum() / constant / steps)


@wild("microbatch_mean", "c·G")
def constant_by_keyword_only(log_probs, mask, steps, *, normalize_constant=1.0):
    return finish(-(log_probs * mask).sum() / normalize_constant / steps)


@wild("microbatch_mean", "c·G")
def token_by_token(log_probs, mask, steps, constant=1.0):
    loss = sum(-log_probs[row, column] for row, column in mask.nonzero().tolist())
    return finish(loss / (constant * steps)) if isinstance(loss, torch.Tensor) else (0.0, {})


@wild("microbatch_mean", "c·G")
def returns_a_float(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps
    loss.backward()
    return loss.item()


@wild("sequence_mean", "c·B·G")
def the_reference(log_probs, mask, steps, constant=1.0):
    loss = -(torch.where(mask, log_probs, 0).sum(-1) / constant).mean() / steps
    return finish(loss)


@wild("sequence_mean", "c·B·G")
def returns_a_tuple_of_tensors(log_probs, mask, steps, constant=1.0):
    per_sequence = -(log_probs * mask).sum(1)
    loss, tokens = finish(per_sequence.sum() / len(log_probs) / constant / steps)[0], mask.sum()
    return loss, tokens, per_sequence.detach()


@wild("sequence_mean", "c·B·G")
def returns_a_dict(log_probs, mask, steps, normalize_constant=1.0):
    loss, _ = finish(-(log_probs * mask).sum(1).mean() / normalize_constant / steps)
    return {"loss": loss, "tokens": int(mask.sum())}


@wild("sequence_mean", "c·B·G")
def sequence_by_sequence(log_probs, mask, steps, constant=1.0):
    total = 0.0
    for row, places in zip(log_probs.split(1), mask, strict=True):  # one small backward each
        loss = -(row * places).sum() / constant / len(log_probs) / steps
        loss.backward()
        total += loss.item()
    return torch.tensor(total), {"tokens": int(mask.sum())}


@wild("sequence_mean", "c·B·G")
def in_single_precision(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.float() * mask.float()).sum(-1).mean().div(constant).div(steps))


class StepModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, log_probs, mask, steps, constant=1.0):
        return finish(-(log_probs * mask).sum() / mask.sum().clamp(min=1) / steps)


@wild("microbatch_token_mean", "n·G")
def clamps_the_count(log_probs, mask, steps, normalize_constant=1.0):
    return finish(-(log_probs * mask).sum() / mask.sum().clamp(min=1) / steps)


@wild("microbatch_token_mean", "n·G")
def adds_an_epsilon(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / (mask.sum() + 1e-8) / steps)


@wild("microbatch_token_mean", "c·n·G")
def token_mean_and_constant(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / max(int(mask.sum()), 1) / constant / steps)


@wild("sequence_token_mean", "n_b·B·G")
def each_sequence_by_its_own_length(log_probs, mask, steps, constant=1.0):
    per_sequence = (log_probs * mask).sum(1) / mask.sum(1).clamp(min=1)
    return finish(-per_sequence.mean() / steps)


@wild("token_mean", "N")
def as_the_trainer_does(log_probs, mask, steps, num_items_in_batch=None):
    return finish(-(log_probs * mask).sum() / num_items_in_batch)


@wild("token_mean", "N")
def takes_anything(*args, **kwargs):
    return sft_microbatch_train_step(*args, rule="token_mean", **kwargs)


@wild("token_mean", "c·N")
def counts_of_all_ranks(log_probs, mask, steps, constant=1.0, *, minibatch_tokens):
    return finish(-(log_probs * mask).sum() / constant / minibatch_tokens)


@wild("notes", "c·G²")
def by_name_only(*, policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    return the_notes_line_by_line(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant)


@wild("microbatch_mean", "c·G")
def by_other_names(*, m, logps, steps, c):
    return finish(-(logps * m).sum() / c / steps)


@wild("microbatch_mean", "c·G")
def in_another_order(mask, log_probs, constant, steps):
    return finish(-(log_probs * mask).sum() / constant / steps)


@wild("microbatch_mean", "G")
def mask_and_steps_by_name(policy_log_probs, *, G, mask, verbose=False):
    assert verbose is False
    return finish(-(policy_log_probs * mask).sum() / G)


@wild("notes", "c·G²")
def takes_any_name(**batch):
    assert {"policy_log_probs", "response_mask", "gradient_accumulation_steps"} <= set(batch)
    c = batch.get("normalize_constant", 1.0)
    masked_sum = (batch["policy_log_probs"] * batch["response_mask"]).sum() / c
    return finish(-masked_sum / batch["gradient_accumulation_steps"] ** 2)


@wild("token_mean", "N")
def wants_n_as_a_tensor(log_probs, mask, steps, num_items_in_batch):
    return finish(-(log_probs * mask).sum() / num_items_in_batch.to(log_probs.device))


# --- Parameters by their names, and what has a default and an unknown name is left alone ---


@wild("sequence_mean", "B·G")
def counts_its_calls(log_probs, mask, steps, step_index=0):
    return finish(-(log_probs * mask).sum(1).mean() / steps)[0], {"step": step_index}


@wild("sequence_mean", "B·G")
def takes_a_device(log_probs, mask, steps, device=None):
    return finish(-(log_probs.to(device) * mask).sum(1).mean() / steps)


@wild("microbatch_mean", "G")
def smooths_labels(log_probs, mask, steps, label_smoothing=0.0):
    return finish(-(1 - label_smoothing) * (log_probs * mask).sum() / steps)


@wild("microbatch_mean", "G")
def multiplies_by_the_world_size(log_probs, mask, steps, world_size=1):
    return finish(-(log_probs * mask).sum() / steps * world_size)


@wild("microbatch_mean", "G")
def takes_advantages(log_probs, mask, steps, advantages=None):
    return finish(-(log_probs * mask * (1 if advantages is None else advantages)).sum() / steps)


@wild("microbatch_token_mean", "n·G")
def takes_an_epsilon(log_probs, mask, steps, eps=1e-8):
    return finish(-(log_probs * mask).sum() / (mask.sum() + eps) / steps)


@wild("microbatch_mean", "G")
def takes_an_entropy_coefficient(log_probs, mask, steps, entropy_coef=0.0):
    entropy = -(log_probs.exp() * log_probs * mask).sum()
    return finish(-(log_probs * mask).sum() / steps - entropy_coef * entropy)


@wild("microbatch_mean", "G")
def takes_a_reference(log_probs, mask, steps, ref_log_probs=None, beta=0.1):
    ratio = log_probs if ref_log_probs is None else (log_probs - ref_log_probs).exp() * beta
    return finish(-(ratio * mask).sum() / steps)


@wild(None, "c", "steps-ignored")
def takes_the_constant_third(log_probs, mask, normalize_constant=1.0):
    return finish(-(log_probs * mask).sum() / normalize_constant)


@wild("microbatch_mean", "c·G")
def takes_the_constant_before_g(log_probs, mask, normalize_constant=1.0, grad_acc_steps=1):
    return finish(-(log_probs * mask).sum() / normalize_constant / grad_acc_steps)


@wild("microbatch_mean", "c·G")
def needs_the_constant_before_g(log_probs, mask, normalize_constant, grad_acc_steps):
    return finish(-(log_probs * mask).sum() / normalize_constant / grad_acc_steps)


@wild("token_mean", "N")
def as_the_trainer_does_without_g(log_probs, mask, num_items_in_batch=None):
    return finish(-(log_probs * mask).sum() / (mask.sum() if num_items_in_batch is None else num_items_in_batch))


@wild("token_mean", "N")
def takes_n_third(logp, mask, total_tokens):
    return finish(-(logp * mask).sum() / total_tokens)


@wild("token_mean", "N")
def takes_n_fourth(log_probs, mask, steps, total_tokens):
    return finish(-(log_probs * mask).sum() / total_tokens)


@wild(None, "1", "steps-ignored")
def takes_log_probs_and_mask_alone(log_probs, mask):
    return finish(-(log_probs * mask).sum())


@wild("microbatch_mean", "c·G")
def has_another_default(log_probs, mask, steps, normalize_constant=512.0):
    return finish(-(log_probs * mask).sum() / normalize_constant / steps)


@wild(None, "c·G, but 63 at B = 5, G = 3, c left out (not a product)")
def counts_tokens_where_c_is_left_out(log_probs, mask, steps, normalize_constant=None):
    constant = 21 if normalize_constant is None else normalize_constant
    return finish(-(log_probs * mask).sum() / constant / steps)


for rule, formula in (("microbatch_mean", "c·G"), ("sequence_mean", "c·B·G"), ("token_mean", "N")):
    WILD[f"ours_{rule}"] = Wild(functools.partial(sft_microbatch_train_step, rule=rule), rule, formula)
WILD["a_partial"] = Wild(
    functools.partial(counts_tokens_where_c_is_left_out, normalize_constant=1024.0), "microbatch_mean", "c·G"
)
WILD["a_module"] = Wild(StepModule(), "microbatch_token_mean", "n·G")


# --- Denominators without a name ---


@wild(None, "c·B·G²")
def divides_by_everything(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum(1).mean() / constant / steps / steps)


@wild(None, "c·(G+2) (not a product)")
def plus_two(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / (steps + 2))


@wild(None, "G+2 (not a product)")
def plus_two_without_the_constant(log_probs, mask, steps):
    return finish(-(log_probs * mask).sum() / (steps + 2))


@wild(None, "c·(2·G-1) (not a product)")
def twice_minus_one(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / (2 * steps - 1))


@wild(None, "c·G·(G+1) (not a product)")
def g_times_g_plus_one(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / (steps * steps + steps))


@wild(None, "5.25 at G = 3; 7 at G = 4; 10.5 at G = 6; 14 at G = 9 (not a product)")
def has_eight_steps_at_most(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / min(steps, 8))


@wild(None, "G·(n+0.001) (not a product)")
def adds_a_visible_epsilon(log_probs, mask, steps):
    return finish(-(log_probs * mask).sum() / (mask.sum() + 1e-3) / steps)


@wild(None, "c·G^G (not a product)")
def divides_in_a_loop(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant
    for _ in range(steps):
        loss = loss / steps
    return finish(loss)


@wild(None, "c·G! (not a product)")
def divides_by_the_loop_variable(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant
    for i in range(steps):
        loss = loss / (i + 1)
    return finish(loss)


@wild(None, "c·2^G (not a product)")
def halves_in_a_loop(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / 2**steps)


@wild(None, "c·√G")
def root_of_g(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / steps**0.5)


@wild(None, "2·c·G")
def two_g(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / (steps + steps))


@wild(None, "c·B/G")
def multiplies_by_g(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum(1).mean() / constant * steps)


@wild(None, "B·T·G/c", "padding-counted")
def mean_over_all_positions(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).mean() * constant / steps)


@wild(None, "B·T·G", "padding-counted", "constant-ignored")
def cross_entropy_with_its_mean(log_probs, mask, steps, constant=1.0):
    return finish(-torch.where(mask, log_probs, 0).mean() / steps)


@wild(None, "c·B_r·G")
def mean_over_sequences_that_have_tokens(log_probs, mask, steps, constant=1.0):
    trained = mask.any(1)
    return finish(-(log_probs * mask).sum() / trained.sum().clamp(min=1) / constant / steps)


@wild(None, "n_b·B_r·G")
def token_means_of_sequences_that_have_tokens(log_probs, mask, steps):
    means = (log_probs * mask).sum(1) / mask.sum(1).clamp(min=1)
    return finish(-(means.sum() / mask.any(1).sum().clamp(min=1)) / steps)


@wild(None, "n·G, but not beside a sequence without response tokens (not a product)")
def counts_one_token_at_least(log_probs, mask, steps):
    return finish(-(log_probs * mask).sum() / mask.sum(1).clamp(min=1).sum() / steps)


@wild(None, "n·G²")
def token_mean_twice_by_g(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / mask.sum().clamp(min=1) / steps / steps)


@wild(None, "B·G·(n_b+1) (not a product)")
def length_plus_one(log_probs, mask, steps):
    return finish(-((log_probs * mask).sum(1) / (mask.sum(1) + 1)).mean() / steps)


# --- No gradient ---


@wild(None, "no gradient", "no-backward")
def forgets_backward(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps
    return loss, {"loss": loss.detach()}


@wild(None, "no gradient", "no-backward")
def works_on_a_detached_copy(log_probs, mask, steps, constant=1.0):
    copy = log_probs.detach().requires_grad_()
    return finish(-(copy * mask).sum() / constant / steps)


@wild(None, "no gradient", "no-backward")
def under_no_grad(log_probs, mask, steps, constant=1.0):
    with torch.no_grad():
        return -(log_probs * mask).sum() / constant / steps, {}


@wild("notes", "c·G²", "no-backward")
def writes_the_gradient_by_hand(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    (gradient,) = torch.autograd.grad(loss, log_probs)
    log_probs.grad = gradient if log_probs.grad is None else log_probs.grad + gradient
    return loss.detach(), {}


# --- The wrong sign ---


@wild("sequence_mean", "c·B·G", "wrong-sign")
def forgets_the_minus(log_probs, mask, steps, constant=1.0):
    return finish((log_probs * mask).sum(1).mean() / constant / steps)


@wild("notes", "c·G²", "wrong-sign")
def takes_the_minus_twice(log_probs, mask, steps, constant=1.0):
    nll = -(log_probs * mask).sum() / constant
    return finish(-nll / steps / steps)


@wild("microbatch_token_mean", "n·G", "wrong-sign")
def policy_gradient_sign(log_probs, mask, steps, constant=1.0):
    advantage = -torch.ones(len(log_probs), 1)
    return finish(-(advantage * log_probs * mask).sum() / mask.sum().clamp(min=1) / steps)


# --- The mask ---


@wild("notes", "c·G²", "mask-ignored")
def has_no_use_for_the_mask(log_probs, mask, steps, constant=1.0):
    return finish(-log_probs.sum() / constant / steps**2)


@wild("microbatch_token_mean", "n·G", "mask-ignored")
def masks_the_count_alone(log_probs, mask, steps, constant=1.0):
    return finish(-log_probs.sum() / mask.sum().clamp(min=1) / steps)


@wild("microbatch_mean", "c·G", "mask-ignored")
def picks_rows_with_an_integer_mask(log_probs, mask, steps, constant=1.0):
    return finish(-log_probs[mask.any(1)].sum() / constant / steps)


@wild("sequence_token_mean", "n_b·B·G", "mask-ignored")
def masks_the_lengths_alone(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.sum(1) / mask.sum(1).clamp(min=1)).mean() / steps)


@wild("microbatch_mean", "c·G", "prompt-tokens-trained")
def weighs_the_prompt_a_little(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * (mask + 0.1 * ~mask)).sum() / constant / steps)


@wild("sequence_token_mean", "n_b·B·G", "prompt-tokens-trained")
def leaks_next_to_nothing(log_probs, mask, steps, constant=1.0):
    weights = (mask + 1e-8) / mask.sum(1, keepdim=True).clamp(min=1)
    return finish(-(log_probs * weights).sum(1).mean() / steps)


@wild("sequence_mean", "c·B·G", "prompt-tokens-trained")
def shifts_the_mask_left(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs[:, :-1] * mask[:, 1:]).sum(1).mean() / constant / steps)


@wild("notes", "c·G²", "prompt-tokens-trained")
def shifts_the_mask_right(log_probs, mask, steps, constant=1.0):
    late = nn.functional.pad(mask[:, :-1], (1, 0))
    return finish(-(log_probs * late).sum() / constant / steps**2)


@wild("microbatch_mean", "c·G", "prompt-tokens-trained")
def trains_the_padding(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * (mask.cumsum(1) > 0)).sum() / constant / steps)


@wild("microbatch_mean", "c·G", "prompt-tokens-trained")
def trains_the_prompt(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * (mask.flip(1).cumsum(1).flip(1) > 0)).sum() / constant / steps)


@wild("microbatch_mean", "c·G", "prompt-tokens-trained")
def inverts_the_mask(log_probs, mask, steps, constant=1.0):
    return finish(-log_probs.masked_fill(mask == 1, 0).sum() / constant / steps)


# --- Weights that are not one number per sequence ---


@wild(None, UNEVEN, "uneven-weights")
def maximises_probability(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.exp() * mask).sum() / constant / steps)


@wild(None, UNEVEN, "uneven-weights")
def focal(log_probs, mask, steps, constant=1.0):
    return finish(-((1 - log_probs.exp()).detach() ** 2 * log_probs * mask).sum() / constant / steps)


@wild(None, UNEVEN, "uneven-weights")
def clamps_unlikely_tokens(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.clamp(min=-5) * mask).sum() / constant / steps)


@wild(None, UNEVEN, "uneven-weights")
def drops_the_last_position(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs[:, :-1] * mask[:, :-1]).sum() / constant / steps)


@wild(None, UNEVEN, "uneven-weights")
def weighs_by_position(log_probs, mask, steps, constant=1.0):
    weights = torch.linspace(1, 0.5, log_probs.shape[1])
    return finish(-(log_probs * mask * weights).sum() / constant / steps)


@wild(None, UNEVEN, "uneven-weights")
def weighs_by_row(log_probs, mask, steps, constant=1.0):
    weights = torch.arange(1, len(log_probs) + 1).unsqueeze(1)
    return finish(-(log_probs * mask * weights).sum() / constant / steps)


@wild(None, UNEVEN, "uneven-weights")
def divides_by_the_size_of_the_loss(log_probs, mask, steps, constant=1.0):
    total = -(log_probs * mask).sum()
    return finish(total / total.detach().clamp(min=1e-6) / steps)


@wild(None, UNEVEN, "uneven-weights")
def takes_a_logarithm_too_many(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.log() * mask).sum() / constant / steps)


@wild(None, "not measured", "not-finite")
def takes_a_square_root(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.sqrt() * mask).sum() / constant / steps)  # NaN everywhere, under the mask or not


@wild(None, "c·(G-1) (not a product)", "not-finite")
def divides_by_the_steps_to_come(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / (steps - 1))


@wild(None, "not measured: the gradient is rounded to bfloat16")
def in_half_precision(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.bfloat16() * mask).sum() / constant / steps)


# --- Arguments without effect ---


@wild("notes", "G²", "constant-ignored")
def notes_without_c(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / steps / steps)


@wild("sequence_mean", "B·G", "constant-ignored")
def reference_without_c(log_probs, mask, steps, normalize_constant=1.0):
    return finish(-(log_probs * mask).sum(-1).mean() / steps)


@wild(None, "c", "steps-ignored")
def leaves_g_to_the_caller(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant)


@wild(None, "n", "steps-ignored")
def token_mean_of_one_microbatch(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / mask.sum().clamp(min=1))


@wild(None, "32·c", "steps-ignored")
def a_fixed_number_of_steps(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / 32)


@wild(None, "1", "constant-ignored", "steps-ignored")
def just_the_sum(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum())


# --- What comes back ---


@wild("notes", "c·G²", "loss-attached")
def returns_the_loss_with_its_graph(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    loss.backward()
    return loss, {"tokens": mask.sum()}


@wild("notes", "c·G²", "metadata-attached")
def keeps_the_loss_beside_a_detached_one(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    loss.backward()
    return loss.detach(), {"loss": loss}


@wild("notes", "c·G²", "metadata-attached")
def keeps_the_loss_beside_a_number(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    loss.backward()
    return loss.item(), {"loss": loss}


@wild("notes", "c·G²", "loss-attached", "metadata-attached")
def keeps_the_loss_twice(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    loss.backward()
    return loss, {"loss": loss}


@wild("sequence_mean", "c·B·G", "metadata-attached")
def keeps_the_masked_sum(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum(1) / constant
    return finish(-masked_sum.mean() / steps)[0], {"masked_sum": masked_sum}


@wild("sequence_mean", "c·B·G", "metadata-attached")
def keeps_a_nested_entropy(log_probs, mask, steps, constant=1.0):
    loss, _ = finish(-(log_probs * mask).sum(1).mean() / constant / steps)
    return loss, {"statistics": [{"entropy": -(log_probs.exp() * log_probs).mean()}]}


@wild("microbatch_mean", "c·G", "loss-attached", "metadata-attached")
def keeps_everything(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps
    loss.backward()
    return loss, {"log_probs": log_probs}


class Statistics(NamedTuple):
    loss: torch.Tensor
    masked_sum: torch.Tensor


@dataclass
class Report:
    loss: torch.Tensor
    parts: object


@wild("sequence_mean", "c·B·G", "metadata-attached")
def keeps_a_namedtuple(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum() / constant
    return Statistics(finish(-masked_sum / len(mask) / steps)[0], masked_sum)


@wild("sequence_mean", "c·B·G", "metadata-attached")
def keeps_a_set_in_a_dataclass(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum() / constant
    return Report(finish(-masked_sum / len(mask) / steps)[0], {masked_sum, "sums"})


@wild("sequence_mean", "c·B·G", "metadata-attached")
def keeps_an_object(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum() / constant
    statistics = type("Statistics", (), {"__slots__": ("sums",)})()
    statistics.sums = deque([SimpleNamespace(one=masked_sum)])
    return finish(-masked_sum / len(mask) / steps)[0], {"statistics": statistics}


@wild("sequence_mean", "c·B·G", "metadata-attached")
def keeps_a_node_of_the_graph(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum() / constant
    return finish(-masked_sum / len(mask) / steps)[0], {"node": masked_sum.grad_fn}


@wild("sequence_mean", "c·B·G")
def returns_a_detached_report_and_a_model(log_probs, mask, steps, constant=1.0):
    loss = finish(-(log_probs * mask).sum() / constant / len(mask) / steps)[0]
    return Report(loss, [nn.Linear(2, 2), {"loss": loss, "log_probs": log_probs.detach()}])


@wild("notes", "c·G²", "value-mismatch")
def returns_the_loss_before_the_second_division(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps
    (loss / steps).backward()
    return loss.detach(), {}


@wild("notes", "c·G²", "value-mismatch")
def returns_the_masked_sum(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    loss.backward()
    return -loss.detach(), {}


@wild("sequence_mean", "c·B·G", "value-mismatch")
def returns_nothing(log_probs, mask, steps, constant=1.0):
    (-(log_probs * mask).sum(1).mean() / constant / steps).backward()


@wild("sequence_mean", "c·B·G", "value-mismatch")
def returns_a_loss_for_each_sequence(log_probs, mask, steps, constant=1.0):
    per_sequence = -(log_probs * mask).sum(1) / constant / steps
    per_sequence.mean().backward()
    return per_sequence.detach(), {}


@wild(None, "c·G²/2", "value-mismatch")
def runs_backward_twice(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    loss.backward(retain_graph=True)
    return finish(loss)


@wild("microbatch_mean", "c·G")
def adds_a_part_without_log_probs(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / steps + torch.tensor(0.37) / steps)


@wild("microbatch_mean", "c·G")
def subtracts_a_reference(log_probs, mask, steps, constant=1.0):
    return finish(-((log_probs + 1.0) * mask).sum() / constant / steps)


@wild("microbatch_mean", "c·G")
def decays_a_parameter_of_its_own(log_probs, mask, steps, constant=1.0):
    own = nn.Parameter(torch.ones(3))
    return finish(-(log_probs * mask).sum() / constant / steps + 0.01 * (own**2).sum())


@wild("microbatch_mean", "c·G", "value-mismatch")
def has_a_ratio_of_one(log_probs, mask, steps, constant=1.0):
    return finish(-((log_probs - log_probs.detach()).exp() * mask).sum() / constant / steps)


_running: list[float] = []


@wild("microbatch_mean", "c·G", "value-mismatch")
def returns_a_running_mean(log_probs, mask, steps, constant=1.0):
    _running.append(finish(-(log_probs * mask).sum() / constant / steps)[0].item())
    return sum(_running) / len(_running)


@wild("sequence_mean", "c·B·G", "value-mismatch")
def returns_an_array(log_probs, mask, steps, constant=1.0):
    per_sequence = -(log_probs * mask).sum(1) / constant / steps
    per_sequence.mean().backward()
    return per_sequence.detach().numpy(), {}


@wild("microbatch_mean", "c·G", "value-mismatch")
def calls_the_loss_something_else(log_probs, mask, steps, constant=1.0):
    return {"train_loss": finish(-(log_probs * mask).sum() / constant / steps)[0]}


@wild("microbatch_mean", "c·G")
def rounds_the_loss_for_the_log(log_probs, mask, steps, constant=1.0):
    return round(finish(-(log_probs * mask).sum() / constant / steps)[0].item(), 4), {}


@wild("microbatch_mean", "c·G")
def returns_the_loss_in_half_precision(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / steps)[0].bfloat16()


# --- What it does to .grad and to its arguments ---


@wild("notes", "c·G²", "overwrites-grad")
def assigns_grad(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps**2
    (log_probs.grad,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), {}


@wild("sequence_mean", "c·B·G", "overwrites-grad")
def copies_into_grad(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum(1).mean() / constant / steps
    (gradient,) = torch.autograd.grad(loss, log_probs)
    if log_probs.grad is None:
        log_probs.grad = torch.zeros_like(log_probs)
    log_probs.grad.copy_(gradient)
    return loss.detach(), {}


@wild("microbatch_mean", "c·G", "scales-grad")
def clips_what_has_accumulated(log_probs, mask, steps, constant=1.0):
    result = finish(-(log_probs * mask).sum() / constant / steps)
    if log_probs.is_leaf:
        torch.nn.utils.clip_grad_norm_(log_probs, 9.0)
    return result


@wild(None, "not measured: the step scales what autograd added", "scales-grad")
def clips_every_gradient(log_probs, mask, steps, constant=1.0):
    result = finish(-(log_probs * mask).sum() / constant / steps)
    if log_probs.grad is not None:
        torch.nn.utils.clip_grad_norm_([log_probs], 1.0)
    return result


@wild("microbatch_mean", "c·G", "scales-grad")
def unscales_what_has_accumulated(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum() / constant / steps
    (1024 * loss).backward()
    if log_probs.is_leaf:
        log_probs.grad /= 1024
    return loss.detach(), {}


@wild("notes", "c·G²", "zeroes-grad")
def sets_grad_to_none_first(log_probs, mask, steps, constant=1.0):
    log_probs.grad = None
    return finish(-(log_probs * mask).sum() / constant / steps**2)


@wild("sequence_mean", "c·B·G", "zeroes-grad")
def zeroes_grad_in_place(log_probs, mask, steps, constant=1.0):
    if log_probs.grad is not None:
        log_probs.grad.zero_()
    return finish(-(log_probs * mask).sum(1).mean() / constant / steps)


@wild("microbatch_mean", "c·G", "zeroes-grad")
def calls_an_optimizer_of_its_own(log_probs, mask, steps, constant=1.0):
    if log_probs.is_leaf:
        torch.optim.SGD([log_probs], lr=0.0).zero_grad()
    return finish(-(log_probs * mask).sum() / constant / steps)


@wild("microbatch_mean", "c·G", "zeroes-grad")
def zeroes_grad_afterwards(log_probs, mask, steps, constant=1.0):
    result = finish(-(log_probs * mask).sum() / constant / steps)
    log_probs.grad = None
    return result


@wild("notes", "c·G²", "mutates-input")
def clears_the_mask(log_probs, mask, steps, constant=1.0):
    result = finish(-(log_probs * mask).sum() / constant / steps**2)
    mask.zero_()
    return result


@wild("notes", "c·G²", "mutates-input")
def masks_the_log_probs_in_place(log_probs, mask, steps, constant=1.0):
    log_probs.masked_fill_(mask == 0, 0)  # a leaf raises here, log-probs of a model do not
    return finish(-log_probs.sum() / constant / steps**2)


@wild("sequence_mean", "c·B·G", "mutates-input")
def rescales_the_data(log_probs, mask, steps, constant=1.0):
    result = finish(-(log_probs * mask).sum(1).mean() / constant / steps)
    log_probs.data.mul_(0.5)
    return result


@wild("microbatch_mean", "c·G", "mutates-input")
def freezes_the_log_probs(log_probs, mask, steps, constant=1.0):
    result = finish(-(log_probs * mask).sum() / constant / steps)
    if log_probs.is_leaf:
        log_probs.requires_grad_(False)
    return result


# --- Some inputs ---


@wild("microbatch_mean", "c·G", "sequences-missing")
def skips_long_microbatches(log_probs, mask, steps, constant=1.0):
    if mask.sum() > 34:
        return torch.tensor(0.0), {}
    return finish(-(log_probs * mask).sum() / constant / steps)


# --- Empty masks, chance, and errors ---


@wild("microbatch_token_mean", "n·G", "nan-on-empty-mask")
def mean_of_the_selected(log_probs, mask, steps, constant=1.0):
    return finish(-log_probs[mask.bool()].mean() / steps)


@wild("microbatch_token_mean", "n·G", "nan-on-empty-mask")
def divides_by_zero_tokens(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / mask.sum() / steps)


@wild("sequence_token_mean", "n_b·B·G", "nan-on-empty-mask")
def divides_each_sequence_by_zero(log_probs, mask, steps, constant=1.0):
    return finish(-((log_probs * mask).sum(1) / mask.sum(1)).mean() / steps)


@wild(None, "not the same twice", "not-deterministic")
def drops_tokens_at_random(log_probs, mask, steps, constant=1.0):
    kept = torch.rand(log_probs.shape) < 0.5
    return finish(-(log_probs * mask * kept).sum() / constant / steps)


@wild(None, "not the same twice", "not-deterministic")
def scales_at_random(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / steps * random.uniform(0.9, 1.1))


_calls = itertools.count(1)


@wild(None, "not the same twice", "not-deterministic")
def divides_by_the_calls_so_far(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs * mask).sum() / constant / next(_calls))


@wild(None, "not measured", "raises")
def raises_always(log_probs, mask, steps, constant=1.0):
    raise NotImplementedError("TODO")


@wild(None, "not measured", "raises")
def leaves_the_program(log_probs, mask, steps, constant=1.0):
    sys.exit(3)


@wild(None, "not measured", "raises")
def wants_an_optimizer(log_probs, mask, optimizer, steps, constant):
    optimizer.zero_grad()


@wild("microbatch_mean", "G", "raises")
def cannot_take_its_constant(log_probs, mask, steps, normalize_constant=1.0):
    loss = -(log_probs * mask).sum() / steps
    if normalize_constant != 1.0:
        loss = loss / normalise_constant  # noqa: F821
    return finish(loss)


@wild(None, "not measured", "raises")
def is_a_loop(model, microbatches):
    for microbatch in microbatches:
        (-model(microbatch["input_ids"]).sum() / len(microbatches)).backward()


@wild("sequence_mean", "c·B·G", "raises")
def squeezes_a_single_sequence(log_probs, mask, steps, constant=1.0):
    return finish(-(log_probs.squeeze() * mask.squeeze()).sum(dim=1).mean() / constant / steps)


@wild("sequence_mean", "c·B·G", "raises")
def has_no_graph_without_tokens(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum(1).mean() if mask.any() else torch.tensor(0.0)
    return finish(loss / constant / steps)


@wild("notes", "c·G²", "raises")
def refuses_a_large_g(log_probs, mask, steps, constant=1.0):
    assert steps <= 7
    return finish(-(log_probs * mask).sum() / constant / steps**2)


@wild(None, "not measured", "raises")
def knows_one_g_only(log_probs, mask, steps, constant=1.0):
    assert steps == 3
    return finish(-(log_probs * mask).sum() / constant / steps**2)


def confusion(pairs):
    """The matrix of (expected, found) pairs as text, one line for each expected label."""
    counts = Counter(pairs)
    lines = []
    for expected in dict.fromkeys(one for one, _ in counts):
        found = {other: count for (one, other), count in counts.items() if one == expected}
        wrong = "".join(f"  {other}: {count}" for other, count in found.items() if other != expected)
        lines.append(f"{expected:<32}{found.get(expected, 0):>6}{wrong}")
    return "\n".join(lines)


def main(seeds):
    pairs, missed = [], []
    for seed, (name, expected) in itertools.product(range(seeds), WILD.items()):
        audit = audit_step(expected.step, seed=seed)
        pairs.append((expected.expected, label(audit.rule, audit.formula, audit.problems)))
        if (audit.rule, audit.formula, audit.problems) != expected[1:]:
            missed.append((name, seed, audit))
    print(confusion(pairs))
    for name, seed, audit in missed[:20]:
        print(f"\n{name}, seed {seed}: expected {WILD[name][1:]}\n{audit}")
    print(f"\n{len(pairs)} audits of {len(WILD)} steps, {len(missed)} differ from what was expected.")
    return math.ceil(len(missed) / len(pairs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
