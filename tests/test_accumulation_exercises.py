"""The checks accept every right answer, and name the mistake in wrong ones."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from sft_edu import RULES, accumulate, closed_form, get_response_log_probs, sft_microbatch_train_step
from sft_edu.exercises import check_accumulation_loop, check_denominator


def forward(model, batch):
    return get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]


def tokens(*microbatches):
    return sum(int(batch["response_mask"].sum()) for batch in microbatches)


def loop(loss_of):
    """A learner's loop with the loss `loss_of(log_probs, mask, microbatches)` for each microbatch."""

    def run(model, microbatches):
        for batch in microbatches:
            loss_of(forward(model, batch), batch["response_mask"], microbatches).backward()

    return run


def summed(x, m):
    return -(x * m).sum()


# --- The loop: right ---


def with_the_step(model, microbatches):
    for batch in microbatches:
        sft_microbatch_train_step(
            forward(model, batch),
            batch["response_mask"],
            len(microbatches),
            rule="token_mean",
            minibatch_tokens=tokens(*microbatches),
        )


def with_the_constant(model, microbatches):
    for batch in microbatches:  # c = N, and G = 1: nothing else divides
        sft_microbatch_train_step(forward(model, batch), batch["response_mask"], 1, tokens(*microbatches))


def with_cross_entropy(model, microbatches):
    for batch in microbatches:
        targets = batch["labels"].masked_fill(~batch["response_mask"], -100)
        loss = F.cross_entropy(model(batch["input_ids"]).mT, targets, ignore_index=-100, reduction="sum")
        (loss / tokens(*microbatches)).backward()


def divided_at_the_end(model, microbatches):
    for batch in microbatches:
        summed(forward(model, batch), batch["response_mask"]).backward()
    for parameter in model.parameters():
        parameter.grad /= tokens(*microbatches)


def weighted_means(model, microbatches):
    for batch in microbatches:
        mean = -forward(model, batch)[batch["response_mask"]].mean()
        (mean * tokens(batch) / tokens(*microbatches)).backward()


def zeroed_before_the_loop(model, microbatches):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad()
    with_the_step(model, microbatches)


def sequence_by_sequence(model, microbatches):
    for batch in microbatches:
        for row in range(len(batch["labels"])):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            (summed(forward(model, one), one["response_mask"]) / tokens(*microbatches)).backward()


def in_reverse(model, microbatches):
    with_cross_entropy(model, microbatches[::-1])


def by_autograd_grad(model, microbatches):
    parameters = list(model.parameters())
    for batch in microbatches:
        loss = summed(forward(model, batch), batch["response_mask"]) / tokens(*microbatches)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def with_the_library(model, microbatches):
    parameters = list(model.parameters())
    gradient = accumulate(model, microbatches).gradient
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def entropy_logged(model, microbatches):
    for batch in microbatches:
        with torch.no_grad():
            model(batch["input_ids"])
        result = get_response_log_probs(model, batch["input_ids"], batch["labels"], return_token_entropy=True)
        (summed(result["log_probs"], batch["response_mask"]) / tokens(*microbatches)).backward()
    return 3.0


def batch_without_padding(model, microbatches):
    for batch in microbatches:
        longest = int(batch["response_mask"].nonzero()[:, 1].max()) + 1
        trimmed = {name: value[:, :longest] for name, value in batch.items()}
        (summed(forward(model, trimmed), trimmed["response_mask"]) / tokens(*microbatches)).backward()


def with_forward_called_by_hand(model, microbatches):
    for batch in microbatches:
        log_probs = model.forward(batch["input_ids"]).log_softmax(-1)  # past the model's hooks
        picked = log_probs.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        (summed(picked, batch["response_mask"]) / tokens(*microbatches)).backward()


@pytest.mark.parametrize(
    "run",
    [
        with_the_step,
        with_the_constant,
        with_cross_entropy,
        divided_at_the_end,
        weighted_means,
        zeroed_before_the_loop,
        sequence_by_sequence,
        in_reverse,
        by_autograd_grad,
        with_the_library,
        entropy_logged,
        batch_without_padding,
        with_forward_called_by_hand,
        loop(lambda x, m, all_: -x[m].sum() / tokens(*all_)),
        loop(lambda x, m, all_: F.binary_cross_entropy(x.exp(), m.to(x), m.to(x), reduction="sum") / tokens(*all_)),
        loop(lambda x, m, all_: -torch.where(m, x, 0).mean() * x.numel() / tokens(*all_)),
    ],
    ids=lambda run: run.__name__,
)
def test_a_right_loop_is_accepted(run):
    verdict = check_accumulation_loop(run)
    assert verdict.passed, verdict


# --- The loop: wrong ---


def optimizer_inside(model, microbatches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in microbatches:
        (summed(forward(model, batch), batch["response_mask"]) / tokens(*microbatches)).backward()
        optimizer.step()


def optimizer_after(model, microbatches):
    with_the_step(model, microbatches)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def zeroed_inside(model, microbatches):
    for batch in microbatches:
        model.zero_grad()
        (summed(forward(model, batch), batch["response_mask"]) / tokens(*microbatches)).backward()


def zeroed_inside_and_own_mean(model, microbatches):
    for batch in microbatches:
        model.zero_grad()
        (-forward(model, batch)[batch["response_mask"]].mean()).backward()


def zeroed_after_the_first(model, microbatches):
    for index, batch in enumerate(microbatches):
        (summed(forward(model, batch), batch["response_mask"]) / tokens(*microbatches)).backward()
        if index == 0:
            model.zero_grad()


def zeroed_at_the_end(model, microbatches):
    with_the_step(model, microbatches)
    model.zero_grad()


def returned_too_early(model, microbatches):
    for batch in microbatches:
        (summed(forward(model, batch), batch["response_mask"]) / tokens(*microbatches)).backward()
        return


def without_backward(model, microbatches):
    return [summed(forward(model, batch), batch["response_mask"]) for batch in microbatches]


def twice(model, microbatches):
    with_the_step(model, microbatches)
    with_the_step(model, microbatches)


def one_backward_at_the_end(model, microbatches):
    losses = [summed(forward(model, batch), batch["response_mask"]) for batch in microbatches]
    (sum(losses) / tokens(*microbatches)).backward()


def all_at_once(model, microbatches):
    with_the_step(model, [{name: torch.cat([b[name] for b in microbatches]) for name in microbatches[0]}])


def in_half_the_precision(model, microbatches):
    with_the_step(model.float(), microbatches)


@pytest.mark.parametrize(
    ("run", "hint"),
    [
        (loop(lambda x, m, all_: -x[m].mean() / len(all_)), "a mean of means is not the mean"),
        (loop(lambda x, m, all_: -x[m].mean()), "divided by its own token count. Divide"),
        (loop(lambda x, m, all_: -x[m].mean() / len(all_) ** 2), "its own token count, and by G twice"),
        (loop(lambda x, m, all_: summed(x, m)), "not divided at all"),
        (loop(lambda x, m, all_: summed(x, m) / len(all_)), "divided by G alone"),
        (loop(lambda x, m, all_: summed(x, m) / len(all_) ** 2), "by G twice, as in the course notes"),
        (loop(lambda x, m, all_: summed(x, m) / 6), "a mean over sequences"),
        (loop(lambda x, m, all_: summed(x, m) / len(x) / len(all_)), "divided by its B, and by G"),
        (loop(lambda x, m, all_: summed(x, m) / tokens(*all_) / len(all_)), "divided by G as well"),
        (loop(lambda x, m, all_: summed(x, m) / tokens(*all_) / len(all_) ** 2), "divided by G twice as well"),
        (loop(lambda x, m, all_: -summed(x, m) / tokens(*all_)), "wrong sign"),
        (loop(lambda x, m, all_: -x.sum() / tokens(*all_)), "in your sum, though not in your count"),
        (loop(lambda x, m, all_: -x.sum() / sum(b["labels"].numel() for b in all_)), "mask 0 are in your loss"),
        (loop(lambda x, m, all_: summed(x, m) / 17), "times as long as the full batch's"),
        (loop(lambda x, m, all_: summed(x**2, m)), "off the full batch's"),
        (twice, "doubled"),
        (zeroed_inside, "Only the last microbatch is left"),
        (zeroed_inside_and_own_mean, "Only the last microbatch is left"),
        (zeroed_after_the_first, "The first microbatch is missing"),
        (zeroed_at_the_end, "The gradient is gone"),
        (optimizer_inside, "The parameters changed"),
        (optimizer_after, "The parameters changed"),
        (lambda model, microbatches: with_the_step(model, microbatches[:-1]), "The last microbatch is missing"),
        (lambda model, microbatches: with_cross_entropy(model, microbatches[:2]), "The last microbatch is missing"),
        (returned_too_early, "Only the first microbatch is there"),
        (without_backward, "No gradient arrived"),
        (one_backward_at_the_end, "memory at once"),
        (all_at_once, "memory at once"),
        (in_half_the_precision, "The model changed its dtype"),
        (lambda model, microbatches: microbatches["labels"], "raised TypeError"),
        (lambda model, microbatches: ..., "Replace the ..."),
        (lambda model, microbatches: None, "Replace the ..."),
    ],
)
def test_a_wrong_loop_gets_the_hint_for_its_mistake(run, hint):
    verdict = check_accumulation_loop(run)
    assert not verdict.passed
    assert hint in verdict.message


# --- The denominators ---


def right(rule, b, g, c, n, total):
    mask = torch.arange(b * n).view(b, n) < n  # B rows and n ones
    return closed_form.denominator(rule, mask, g, c, total)


def but(**changed):
    """The right denominators, but for some rules."""
    return lambda rule, *counts: changed[rule](*counts) if rule in changed else right(rule, *counts)


@pytest.mark.parametrize(
    "denominator",
    [
        right,
        lambda *a: torch.tensor(right(*a), dtype=torch.float64),
        lambda *a: Fraction(right(*a)),
        lambda rule, B, G, c, n, N: RULES[rule].denominator({"1": 1, "B": B, "G": G, "c": c, "n": n, "N": N}),
        lambda rule, *counts: {r: right(r, *counts) for r in RULES}[rule],
        {rule: lambda *counts, rule=rule: right(rule, *counts) for rule in RULES},
        {rule: partial(right, rule) for rule in RULES} | {"notes": lambda B, G, c, n, N: G * c * G},
    ],
)
def test_right_denominators_are_accepted(denominator):
    verdict = check_denominator(denominator)
    assert verdict.passed, verdict
    assert "notes c·G²" in verdict.message


@pytest.mark.parametrize(
    ("denominator", "hint"),
    [
        (..., "Replace the ..."),
        (lambda *_: ..., "Replace the ..."),
        (dict.fromkeys(RULES, ...), "Replace the ..."),
        ({}, "notes: not in your dict"),
        (lambda *_: None, "notes: got NoneType; a number is asked for"),
        (lambda *_: torch.ones(2), "notes: got Tensor; a number is asked for"),
        (lambda rule: 1, "raised TypeError"),
        (dict.fromkeys(RULES, 4), "raised TypeError"),
        (but(notes=lambda b, g, c, n, t: c * g), "notes: G is missing once"),
        (but(notes=lambda b, g, c, n, t: c), "notes: G is missing."),
        (but(notes=lambda b, g, c, n, t: g**2), "notes: the constant c is missing"),
        (but(notes=lambda b, g, c, n, t: c * 2 * g), "notes: you wrote G + G"),
        (but(notes=lambda b, g, c, n, t: c * g**g), "notes: you wrote G**G"),
        (but(notes=lambda b, g, c, n, t: -c * g**2), "notes: D is positive"),
        (but(notes=lambda b, g, c, n, t: 1 / (c * g**2)), "notes: that is 1/D"),
        (but(microbatch_mean=lambda b, g, c, n, t: c * g * g), "microbatch_mean: G is in your formula once too often"),
        (but(microbatch_mean=lambda b, g, c, n, t: c * g * b), "microbatch_mean: B is in your formula"),
        (but(sequence_mean=lambda b, g, c, n, t: c * g), "sequence_mean: B is missing"),
        (but(microbatch_token_mean=lambda b, g, c, n, t: t * g), "microbatch_token_mean: you wrote N"),
        (but(microbatch_token_mean=lambda b, g, c, n, t: c * n * g), "microbatch_token_mean: c is in your formula"),
        (but(microbatch_token_mean=lambda b, g, c, n, t: t), "microbatch_token_mean: that is the denominator of token"),
        (but(token_mean=lambda b, g, c, n, t: n), "token_mean: you wrote n"),
        (but(token_mean=lambda b, g, c, n, t: n * g), "token_mean: that is the denominator of microbatch_token_mean"),
        (but(token_mean=lambda b, g, c, n, t: t * g), "token_mean: G is in your formula once too often"),
        (but(token_mean=lambda b, g, c, n, t: 5), "has to be exactly the full-batch mean over tokens"),
    ],
)
def test_a_wrong_denominator_gets_the_hint_for_its_mistake(denominator, hint):
    verdict = check_denominator(denominator)
    assert not verdict.passed
    assert hint in verdict.message
    assert "Judged" not in verdict.message
