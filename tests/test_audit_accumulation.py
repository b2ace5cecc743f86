"""Does the audit of a loop find which full-batch gradient it accumulates, and the smallest split that gives another?

Here a loop is written as the loss of one microbatch; `loop` makes it a whole one.
"""

import copy
import functools
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sft_edu import (
    RULES,
    AccumulationAudit,
    TinyLM,
    audit_accumulation,
    get_response_log_probs,
    sft_microbatch_train_step,
)
from sft_edu.audit.accumulation_report import LOOP_PROBLEMS, OBJECTIVES
from sft_edu.audit.loop_probe import compositions
from sft_edu.ragged import ragged_minibatch


def minibatch_of(*lengths):
    """Sequences of random tokens with a prompt of two and these many response tokens."""
    columns = 2 + max(lengths)
    ids = torch.randint(0, 255, (len(lengths), columns + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(len(lengths), columns, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[2 : 2 + length] = True
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask}


def log_probs_of(model, microbatch):
    return get_response_log_probs(model, microbatch["input_ids"], microbatch["labels"])["log_probs"]


def tokens_of(microbatches):
    return sum(int(microbatch["response_mask"].sum()) for microbatch in microbatches)


def loop(loss):
    """A loop over `loss(log_probs, mask, G, N, M)`, N and M the tokens and sequences of all microbatches."""

    def run(model, microbatches):
        counts = len(microbatches), tokens_of(microbatches), sum(len(one["labels"]) for one in microbatches)
        for microbatch in microbatches:
            loss(log_probs_of(model, microbatch), microbatch["response_mask"], *counts).backward()

    return run


def with_rule(rule):
    def run(model, microbatches):
        for one in microbatches:
            sft_microbatch_train_step(
                log_probs_of(model, one),
                one["response_mask"],
                len(microbatches),
                rule=rule,
                minibatch_tokens=tokens_of(microbatches),
            )

    return run


def one_optimizer_step_too_many(model, microbatches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for one in microbatches:
        (-(log_probs_of(model, one) * one["response_mask"]).sum() / tokens_of(microbatches)).backward()
        optimizer.step()


def forgets_all_but_the_last(model, microbatches):
    for one in microbatches:
        model.zero_grad()
        (-(log_probs_of(model, one) * one["response_mask"]).sum() / tokens_of(microbatches)).backward()


def zeroes_at_the_end(model, microbatches):
    with_rule("token_mean")(model, microbatches)
    model.zero_grad()


def skips_the_last_of_several(model, microbatches):
    with_rule("token_mean")(model, microbatches[:-1] or microbatches)


def adds_a_parameter(model, microbatches):
    model.extra = nn.Parameter(torch.zeros(3))
    with_rule("token_mean")(model, microbatches)


def raises_the_second_time(model, microbatches):
    raises_the_second_time.calls += 1
    assert raises_the_second_time.calls < 2
    with_rule("token_mean")(model, microbatches)


raises_the_second_time.calls = 0


def clears_the_masks(model, microbatches):
    with_rule("token_mean")(model, microbatches)
    for one in microbatches:
        one["response_mask"][:] = 0


def scales_at_random(model, microbatches):
    loop(lambda x, m, g, n, s: -(x * m).sum() / n * random.uniform(0.9, 1.1))(model, microbatches)


def raises_for_one_sequence(model, microbatches):
    assert all(len(one["labels"]) > 1 for one in microbatches)
    with_rule("token_mean")(model, microbatches)


def scaled_mask(x, m, weight):
    return -(x * (m + weight * ~m)).sum()


def clips(max_norm, between):
    def run(model, microbatches):
        for one in microbatches:
            (-(log_probs_of(model, one) * one["response_mask"]).sum() / tokens_of(microbatches)).backward()
            if between:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    return run


def of_one(place):
    """Divides every microbatch by the tokens of one of them, and by G."""

    def run(model, microbatches):
        for one in microbatches:
            loss = -(log_probs_of(model, one) * one["response_mask"]).sum()
            (loss / tokens_of([microbatches[place]]) / len(microbatches)).backward()

    return run


def by_tokens_so_far(model, microbatches):
    for place, one in enumerate(microbatches, start=1):
        (-(log_probs_of(model, one) * one["response_mask"]).sum() / tokens_of(microbatches[:place])).backward()


def skips_short_microbatches(model, microbatches):
    used = [one for one in microbatches if one["response_mask"].sum() >= 4]
    total = tokens_of(microbatches)
    for one in used:
        (-(log_probs_of(model, one) * one["response_mask"]).sum() / total).backward()


def zeroes_every_fourth(model, microbatches):
    for place, one in enumerate(microbatches):
        (-(log_probs_of(model, one) * one["response_mask"]).sum() / tokens_of(microbatches)).backward()
        if place % 4 == 3:
            model.zero_grad()


def clips_values(model, microbatches):
    with_rule("token_mean")(model, microbatches)
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def decays_weights(model, microbatches):
    with_rule("token_mean")(model, microbatches)
    (0.01 * sum(parameter.square().sum() for parameter in model.parameters())).backward()


def pops_the_microbatches(model, microbatches):
    total, steps = tokens_of(microbatches), len(microbatches)
    while microbatches:
        one = microbatches.pop()
        loss = -(log_probs_of(model, one) * one["response_mask"]).sum() / total
        (loss * steps / steps).backward()


def pops_the_labels(model, microbatches):
    total = tokens_of(microbatches)
    for one in microbatches:
        mask = one.pop("response_mask")
        (-(log_probs_of(model, one) * mask).sum() / total).backward()


SPLIT = ("depends-on-split",)
EMPTY = "nan-on-empty-mask"
# loop: objective, rule, formula, problems
LOOPS = {
    "token_mean": (with_rule("token_mean"), "token_mean", "token_mean", "N", ()),
    "notes": (with_rule("notes"), None, "notes", "G²", SPLIT),
    "microbatch_mean": (with_rule("microbatch_mean"), None, "microbatch_mean", "G", SPLIT),
    "sequence_mean": (with_rule("sequence_mean"), None, "sequence_mean", "B·G", SPLIT),
    "microbatch_token_mean": (with_rule("microbatch_token_mean"), None, "microbatch_token_mean", "n·G", SPLIT),
    "sequence_token_mean of each microbatch": (
        loop(lambda x, m, g, n, s: -((x * m).sum(1) / m.sum(1).clamp(min=1)).mean() / g),
        *(None, "sequence_token_mean", "n_b·B·G", SPLIT),
    ),
    "mean over all sequences": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / s),
        *("sequence_mean", "sequence_mean", "M", ()),
    ),
    "mean over all sequences of token means": (
        loop(lambda x, m, g, n, s: -((x * m).sum(1) / m.sum(1).clamp(min=1)).sum() / s),
        *("sequence_token_mean", "sequence_token_mean", "n_b·M", ()),
    ),
    "sum": (loop(lambda x, m, g, n, s: -(x * m).sum()), "sum", None, "1", ()),
    "in single precision": (
        loop(lambda x, m, g, n, s: -(x.float() * m).sum() / n),
        *("token_mean", "token_mean", "N", ()),
    ),
    "half of it": (loop(lambda x, m, g, n, s: -(x * m).sum() / (2 * n)), None, None, "2·N", ()),
    "by G as well": (loop(lambda x, m, g, n, s: -(x * m).sum() / n / g), None, None, "N·G", SPLIT),
    "G of yesterday": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / len(x) / 3),
        *(None, None, "3·B", ("depends-on-split", "partial-window")),
    ),
    "G plus two": (loop(lambda x, m, g, n, s: -(x * m).sum() / (g + 2)), None, None, "G+2 (not a product)", SPLIT),
    "mean of no tokens": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / m.sum() / g),
        *(None, "microbatch_token_mean", "n·G", ("depends-on-split", EMPTY)),
    ),
    "no minus": (loop(lambda x, m, g, n, s: (x * m).sum() / n), None, "token_mean", "N", ("wrong-sign",)),
    "no mask": (loop(lambda x, m, g, n, s: -x.sum() / n), None, "token_mean", "N", ("mask-ignored",)),
    "prompt trained": (
        loop(lambda x, m, g, n, s: -(x * (m.flip(1).cumsum(1).flip(1) > 0)).sum() / n),
        *(None, "token_mean", "N", ("prompt-tokens-trained",)),
    ),
    "padding trained": (
        loop(lambda x, m, g, n, s: -(x * (m.cumsum(1) > 0)).sum() / n),
        *(None, "token_mean", "N", ("prompt-tokens-trained",)),
    ),
    "probability": (
        loop(lambda x, m, g, n, s: -(x.exp() * m).sum() / n),
        *(None, None, "not a fixed weight per token", ("uneven-weights",)),
    ),
    "zeroes inside": (
        forgets_all_but_the_last,
        *(None, "token_mean", "N", ("sequences-missing", "depends-on-split")),
    ),
    "skips the last": (
        skips_the_last_of_several,
        *(None, None, None, ("sequences-missing", "depends-on-split")),
    ),
    "zeroes at the end": (zeroes_at_the_end, None, None, "no gradient", ("no-backward",)),
    "does nothing": (lambda model, microbatches: None, None, None, "no gradient", ("no-backward",)),
    "steps inside": (
        one_optimizer_step_too_many,
        *(None, None, "not measured", ("changes-parameters", "depends-on-split")),
    ),
    "a little of the prompt": (
        loop(lambda x, m, g, n, s: scaled_mask(x, m, 1e-3) / n),
        *(None, "token_mean", "N", ("prompt-tokens-trained",)),
    ),
    "clips at the end": (clips(1e-3, False), None, None, "not measured: the gradient is clipped", ("clipped",)),
    "clips inside": (
        clips(1e-3, True),
        *(None, None, "not measured: the gradient is clipped", ("clipped", "depends-on-split")),
    ),
    "clips at the end, one set alone": (
        clips(3.5, False),
        *(None, None, "not measured: the gradient is clipped", ("clipped",)),
    ),
    "clips inside, one set alone": (
        clips(3.5, True),
        *(None, None, "not measured: the gradient is clipped", ("clipped",)),
    ),
    "clips at the end, half of them": (
        clips(1.8, False),
        *(None, None, "not measured: the gradient is clipped", ("clipped",)),
    ),
    "skips short microbatches": (
        skips_short_microbatches,
        *(None, "token_mean", "N", ("sequences-missing", "depends-on-split")),
    ),
    "zeroes every fourth": (
        zeroes_every_fourth,
        *(None, "token_mean", "N", ("sequences-missing", "depends-on-split")),
    ),
    "in half precision": (
        loop(lambda x, m, g, n, s: -(x.bfloat16() * m).sum() / n),
        *(None, None, "not measured: within 1% of token_mean, as after rounding to 16 bits", ()),
    ),
    "another rule for one set": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / (n if n != 9 else 11)),
        *(None, None, "N, but not with the split [2] of sequences 1 and 2 (not a product)", ()),
    ),
    "first microbatch's tokens": (of_one(0), None, None, "n_first·G", SPLIT),
    "last microbatch's tokens": (of_one(-1), None, None, "n_last·G", SPLIT),
    "clips values": (clips_values, None, None, "not measured: the gradient is clipped", ("clipped",)),
    "decays weights": (decays_weights, None, None, "no sum over tokens", ("foreign-gradient",)),
    "one token more": (loop(lambda x, m, g, n, s: -(x * m).sum() / (n + 1)), None, None, "N+1 (not a product)", ()),
    "tokens and sequences": (loop(lambda x, m, g, n, s: -(x * m).sum() / (n + s)), None, None, None, ()),
    "mean over positions": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / s / x.shape[1]),
        *(None, None, "M·T", ("padding-counted",)),
    ),
    "mean over positions of a microbatch": (
        loop(lambda x, m, g, n, s: -(x * m).mean() / g),
        *(None, None, "B·T·G", ("depends-on-split", "padding-counted")),
    ),
    "mean over sequences that have tokens": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / m.any(1).sum().clamp(min=1) / g),
        *(None, None, "B_r·G", SPLIT),
    ),
    "pops the microbatches": (pops_the_microbatches, "token_mean", "token_mean", "N", ("mutates-input",)),
    "pops the masks": (pops_the_labels, "token_mean", "token_mean", "N", ("mutates-input",)),
    "clears the masks": (clears_the_masks, "token_mean", "token_mean", "N", ("mutates-input",)),
    "random": (scales_at_random, None, None, "not the same twice", ("not-deterministic",)),
    "raises": (lambda model, microbatches: 1 / 0, None, None, "not measured", ("raises",)),
    "raises later": (raises_the_second_time, None, None, "not the same twice", ("not-deterministic", "raises")),
    "not finite": (
        loop(lambda x, m, g, n, s: -(x.sqrt() * m).sum() / n),
        *(None, None, "not measured", ("not-finite",)),
    ),
    "not finite for one": (
        loop(lambda x, m, g, n, s: -(x * m).sum() / n + (0 * x.sqrt().sum() if len(x) == 1 else 0)),
        *("token_mean", "token_mean", "N", ("not-finite", "nan-on-empty-mask")),
    ),
    "adds a parameter": (adds_a_parameter, None, None, "not measured", ("changes-parameters",)),
    "raises for one": (raises_for_one_sequence, "token_mean", "token_mean", "N", ("raises",)),
}


@functools.cache
def audit_of(name):
    return audit_accumulation(LOOPS[name][0], minibatch=minibatch_of(5, 2, 7, 1, 4, 3))


@pytest.mark.parametrize("name", LOOPS)
def test_the_audit_says_which_loop_it_is(name):
    audit = audit_of(name)
    _, objective, rule, formula, problems = LOOPS[name]
    print(audit)
    assert audit.problems == problems
    assert (audit.objective, audit.rule) == (objective, rule)
    assert formula in (None, audit.formula)
    assert audit.invariant == (
        "depends-on-split" not in problems
        and audit.formula not in ("no gradient", "not measured", "not the same twice")
    )
    assert audit.ok == (not problems)


def test_every_problem_and_every_rule_has_a_loop():
    assert {code for one in LOOPS.values() for code in one[4]} == set(LOOP_PROBLEMS) - {"wrong-on-empty-mask"}
    assert {one[2] for one in LOOPS.values()} >= set(RULES) | {"sequence_token_mean"}
    assert {one[1] for one in LOOPS.values()} >= set(OBJECTIVES)


def test_the_errors_over_all_splits_are_exact_or_far_away():
    audit = audit_of("token_mean")
    assert audit.errors["token_mean"] <= 1e-14
    assert min(error for name, error in audit.errors.items() if name != "token_mean") >= 1e-2
    assert 1e-9 < audit_of("in single precision").errors["token_mean"] <= 2e-6
    assert min(audit_of("microbatch_token_mean").errors.values()) >= 1e-2


def test_the_smallest_counterexample_has_the_fewest_sequences_in_the_fewest_microbatches():
    found = audit_of("microbatch_token_mean").counterexample
    assert (len(found.lengths), found.sizes) == (2, (1, 1))
    assert found.relative_error >= 1e-2
    assert (
        str(found)
        == "2 sequences of 5, 2 response tokens, split [1, 1]: 54.36% off the same sequences in one microbatch."
    )
    assert str(found) in str(audit_of("microbatch_token_mean"))
    assert audit_of("sequence_mean").counterexample.sizes == (1, 2)  # two sequences cannot show it
    assert audit_of("token_mean").counterexample is None


@pytest.mark.parametrize("lengths", [(24, 23), (24, 24, 24, 23), (23, 24, 24)])
def test_a_mean_of_means_is_told_apart_at_24_to_23_tokens(lengths):
    minibatch = minibatch_of(*lengths)
    right = audit_accumulation(with_rule("token_mean"), minibatch=minibatch)
    wrong = audit_accumulation(with_rule("microbatch_token_mean"), minibatch=minibatch)
    assert (right.objective, right.rule, right.ok) == ("token_mean", "token_mean", True)
    assert (wrong.objective, wrong.rule) == (None, "microbatch_token_mean")
    assert set(wrong.counterexample.lengths) == {23, 24}
    assert 1e-3 < wrong.counterexample.relative_error < 0.1


def test_a_loop_that_is_thrown_off_by_an_empty_microbatch_is_told_so():
    def run(model, microbatches):
        total = tokens_of(microbatches) * (1 + sum(not one["response_mask"].any() for one in microbatches))
        loop(lambda x, m, g, n, s: -(x * m).sum() / total)(model, microbatches)

    audit = audit_accumulation(run, minibatch=minibatch_of(3, 1, 2))
    assert (audit.objective, audit.problems) == ("token_mean", ("wrong-on-empty-mask",))
    assert "50.00% off" in audit.details["wrong-on-empty-mask"]


def test_sequences_without_tokens_may_be_left_out_of_a_mean_over_sequences():
    def run(model, microbatches):
        used = sum(int(one["response_mask"].any(1).sum()) for one in microbatches)
        loop(lambda x, m, g, n, s: -(x * m).sum() / used)(model, microbatches)

    assert audit_accumulation(run, minibatch=minibatch_of(3, 1, 2)).problems == ()


def test_a_mean_over_sequences_that_have_tokens_is_told_from_one_over_all():
    def run(model, microbatches):
        used = sum(int(one["response_mask"].any(1).sum()) for one in microbatches)
        loop(lambda x, m, g, n, s: -(x * m).sum() / used)(model, microbatches)

    audit = audit_accumulation(run, minibatch=minibatch_of(3, 1, 2, 4))
    assert (audit.objective, audit.rule, audit.formula, audit.problems) == ("sequence_mean", None, "M_r", ())
    assert audit.consequence.endswith("Sequences without response tokens are not counted.")
    assert audit_of("mean over all sequences").formula == "M"
    assert "not counted" not in audit_of("mean over all sequences").consequence


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half of it", "it is token_mean times a constant factor"),
        ("one token more", "D is no fixed multiple of a count"),
        ("tokens and sequences", "D is no fixed multiple of a count"),
        ("clips at the end", "the gradient has the direction of token_mean and the length 0.001"),
        ("clips at the end", "That happens once, after the last microbatch."),
        ("clips at the end, half of them", "That happens once, after the last microbatch."),
        ("clips at the end, one set alone", "It is clipped by norm: in 2 of "),
        ("clips inside", "Runs of several microbatches have another direction, as when every microbatch is clipped."),
        ("clips inside, one set alone", "Whether once or after every microbatch, these runs do not show."),
        ("in half precision", "audit it again in float32 or float64"),
        ("clips values", "It is clipped by value: for "),
        ("decays weights", "no weights of its tokens add up to the gradient"),
        ("probability", "the tokens of one sequence have different weights"),
        ("steps inside", "its microbatches are not those of one step"),
        ("a little of the prompt", "with at most 0.001 times the weight of those under it"),
        ("pops the microbatches", "the list of microbatches, or a dict in it, had other entries"),
    ],
)
def test_the_words_say_no_more_than_was_measured(name, words):
    audit = audit_of(name)
    assert words in " ".join([*audit.details.values(), audit.consequence])


@pytest.mark.parametrize("lengths", [(20, 6), (3, 1)])
def test_exponents_that_two_sequences_do_not_determine_are_not_invented(lengths):
    named = audit_accumulation(with_rule("token_mean"), minibatch=minibatch_of(*lengths))
    assert (named.objective, named.formula) == ("token_mean", "N")
    halved = audit_accumulation(LOOPS["half of it"][0], minibatch=minibatch_of(*lengths))
    assert (halved.objective, halved.rule, halved.formula) == (None, None, "not determined by these data")
    assert "give more sequences" in halved.consequence


def takes_the_model_apart(model, microbatches):
    model._modules.clear()
    model._parameters.clear()


HOSTILE = {
    "takes the model apart": (takes_the_model_apart, "changes-parameters"),
    "empties the model": (lambda model, microbatches: model.__dict__.clear(), "changes-parameters"),
    "moves the model nowhere": (lambda model, microbatches: model.to("meta"), "changes-parameters"),
    "halves the model": (lambda model, microbatches: model.half(), "changes-parameters"),
    "fills the list with rubbish": (lambda model, microbatches: microbatches.append(3), "mutates-input"),
    "replaces a batch": (lambda model, microbatches: microbatches.__setitem__(0, "batch"), "mutates-input"),
    "empties a batch": (lambda model, microbatches: microbatches[0].clear(), "mutates-input"),
    "leaves the program": (lambda model, microbatches: sys.exit(3), "raises"),
    "prints": (lambda model, microbatches: print("\udce4" * 1000), ""),
    "changes settings": (lambda model, microbatches: (torch.set_grad_enabled(False), torch.manual_seed(0)), ""),
    "changes the folder": (lambda model, microbatches: os.chdir("/"), ""),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_loop_is_reported_and_leaves_no_trace(what, capfd):
    harm, code = HOSTILE[what]

    def run(model, microbatches):
        with_rule("token_mean")(model, microbatches)
        harm(model, microbatches)

    before = torch.get_rng_state(), torch.is_grad_enabled(), Path.cwd(), random.getstate()
    audit = audit_accumulation(run, minibatch=minibatch_of(3, 1, 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), Path.cwd(), random.getstate()) == before[1:]
    assert audit.problems[:1] == ((code,) if code else ())
    assert capfd.readouterr() == ("", "")
    if code in ("", "mutates-input", "raises"):
        assert audit.objective == "token_mean"


class OneDirection(nn.Module):
    """Every sequence has a gradient along the same single parameter."""

    vocab_size = 257

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input_ids):
        return self.temperature * torch.linspace(-1, 2, self.vocab_size).expand(*input_ids.shape, -1).clone()


def test_weights_that_a_model_with_few_directions_does_not_determine_are_not_invented():
    arguments = {"model": OneDirection(), "minibatch": minibatch_of(5, 2, 7, 1)}
    named = audit_accumulation(with_rule("token_mean"), **arguments)
    assert (named.objective, named.formula, named.problems) == ("token_mean", "N", ())
    halved = audit_accumulation(LOOPS["half of it"][0], **arguments)
    assert halved.formula == "not determined by these data: the model has fewer directions than there are sequences"
    assert (halved.objective, halved.rule, halved.problems) == (None, None, ())


def test_padding_that_cannot_be_varied_is_named_as_the_number_it_is():
    def run(model, microbatches):
        loop(lambda x, m, g, n, s: -(x * m).sum() / s / x.shape[1])(model, microbatches)

    minibatch = {name: tensor.flip(1)[:, :-2] for name, tensor in minibatch_of(5, 2, 7, 1).items()}
    assert audit_accumulation(run, minibatch=minibatch).formula == "7·M, with T = 7 in every run"


def test_all_128_splits_of_eight_are_run_and_all_equal_ones_of_more():
    assert len(set(compositions(8))) == 128
    assert [len(sizes) for sizes in compositions(8)] == sorted(len(sizes) for sizes in compositions(8))
    assert next(compositions(8)) == (8,)
    seen = set()

    def run(model, microbatches):
        seen.add(tuple(len(one["labels"]) for one in microbatches))
        with_rule("token_mean")(model, microbatches)

    assert audit_accumulation(run, minibatch=minibatch_of(1, 2, 3, 4, 1, 2, 3, 4)).runs >= 170
    assert set(compositions(8)) <= seen
    for total in (9, 10):
        many = list(compositions(total))
        assert len(set(many)) == len(many)
        assert [len(sizes) for sizes in many] == sorted(len(sizes) for sizes in many)
        assert {sum(sizes) for sizes in many} == {total}
        assert {(total,), (4, total - 4), (1, total - 1), (3, 3, 3) + (1,) * (total - 9), (1,) * total} <= set(many)


# --- The model and the process stay as they were ---


class WithBuffer(TinyLM):
    """A model of the user's own: float32, frozen parts, a buffer, dropout, an output with `.logits`."""

    def __init__(self):
        super().__init__(d_model=8, num_layers=1, num_heads=2)
        self.register_buffer("seen", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)
        self.position_embedding.weight.requires_grad_(False)

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.dropout(super().forward(input_ids))})


def test_the_given_model_keeps_its_parameters_its_mode_and_its_very_gradients():
    model, minibatch = WithBuffer(), ragged_minibatch(4, imbalance=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.final_norm.bias.grad = None
    gradients = [parameter.grad for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict()), [None if g is None else g.clone() for g in gradients]
    rows = copy.deepcopy(minibatch)
    audit = audit_accumulation(with_rule("token_mean"), model, minibatch)
    assert audit.ok
    assert model.training
    for parameter, kept, value in zip(model.parameters(), gradients, before[1], strict=True):
        assert parameter.grad is kept
        assert value is None or torch.equal(kept, value)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, rows[name]) for name, value in minibatch.items())


def test_a_loop_that_uses_the_model_outside_is_told_so_and_undone():
    outside = WithBuffer()
    optimizer = torch.optim.SGD(outside.parameters(), lr=0.1)
    before = copy.deepcopy(outside.state_dict())

    def run(model, microbatches):
        with_rule("token_mean")(outside, microbatches)
        optimizer.step()
        outside.seen.add_(1)

    audit = audit_accumulation(run, outside, ragged_minibatch(3, imbalance=1.0))
    assert audit.problems == ("no-backward",)
    assert "in the model outside" in audit.details["no-backward"]
    assert all(torch.equal(value, before[name]) for name, value in outside.state_dict().items())
    assert all(parameter.grad is None for parameter in outside.parameters())


@pytest.mark.parametrize("how", ["raises", "interrupts"])
def test_everything_is_as_before_also_when_the_loop_fails(how):
    model = TinyLM(d_model=8, num_layers=1, num_heads=2)
    model.head.weight.grad = gradient = torch.ones_like(model.head.weight)

    def run(model, microbatches):
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        raise KeyboardInterrupt if how == "interrupts" else SystemExit(1)

    state = torch.get_rng_state()
    if how == "interrupts":
        with pytest.raises(KeyboardInterrupt):
            audit_accumulation(run, model)
    else:
        assert audit_accumulation(run, model).problems == ("raises",)
    assert model.head.weight.grad is gradient
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


# --- Arguments and reports ---


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((42,), TypeError, r"^run_minibatch: got 42 \(int\); expected a function"),
        ((print, 42), TypeError, r"^model: got int; expected a torch.nn.Module"),
        ((print, None, [1]), TypeError, r"^batch: got list; expected a dict"),
        ((print, None, minibatch_of(3, 3)), ValueError, r"^minibatch: got sequences of 3, 3 response tokens; expected"),
        ((print, None, minibatch_of(3, 0)), ValueError, r"^minibatch: got sequences of 3, 0 response tokens; expected"),
    ],
    ids=["loop", "model", "batch", "equal", "empty"],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        audit_accumulation(*arguments)


def test_the_report_reads_well():
    assert str(audit_of("zeroes inside")).splitlines() == [
        "forgets_all_but_the_last: not the full batch's gradient; each microbatch: token_mean, D = N",
        "Largest distance from the full batch, over the splits of the whole minibatch: token_mean 91.7%, "
        "sequence_mean 96.5%, sequence_token_mean 93.2%, sum 99.4%.",
        "2 problems found in 68 runs:",
        "  sequences-missing  With the split [1, 1] nothing comes from sequence 0.",
        "  depends-on-split   Smallest counterexample: 2 sequences of 5, 2 response tokens, split [1, 1]: "
        "71.93% off the same sequences in one microbatch.",
        "Some sequences of the minibatch train nothing.",
    ]


def test_a_loop_that_is_the_full_batch_for_the_whole_minibatch_alone_is_not_always_it():
    audit = audit_accumulation(clips(1.0, True))
    first, second, *_ = str(audit).splitlines()
    assert first.startswith("run: not always the full batch's gradient; each microbatch: no rule with a name")
    assert "over the splits of the whole minibatch: token_mean 0 (up to rounding)," in second
    assert len(audit.counterexample.lengths) == 2


def test_a_table_of_values_says_whose_counts_they_are():
    formula = audit_accumulation(by_tokens_so_far).formula
    assert formula.startswith("20 at N = 192, M = 8, G = 8, T = 139, n_b = 20, n = 20, B = 1; ")
    assert formula.endswith(" (not a product; n_b is of one sequence, n and B of its microbatch)")


def test_the_html_is_escaped():
    evil = "<img src=x onerror=alert(1)>"
    audit = AccumulationAudit(evil, None, evil, evil, False, {evil: 1.0}, None, (evil,), {evil: evil}, evil, 1)
    assert "<img" not in audit._repr_html_()
    assert audit._repr_html_().count("&lt;img") == 7


def test_a_loop_that_skips_the_last_microbatch_is_not_said_to_train_nothing():
    def skips(model, microbatches):
        for batch in microbatches[:-1]:
            model(batch["input_ids"]).sum().backward()

    audit = audit_accumulation(skips, minibatch=ragged_minibatch(3, imbalance=1.0))
    assert audit.problems == ("sequences-missing",)
    assert audit.details["sequences-missing"] == ("With the split [3] nothing is trained, with [1, 1, 1] something is.")


class WithExtraState(TinyLM):
    """Its state dict holds something that is no tensor, and lacks a buffer."""

    def __init__(self):
        super().__init__(d_model=8, num_layers=1, num_heads=2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def get_extra_state(self):
        return {"epoch": 1}

    def set_extra_state(self, state):
        raise NotImplementedError


def test_a_state_dict_may_hold_anything_and_a_buffer_that_is_not_in_it_is_kept_too():
    outside = WithExtraState()

    def run(model, microbatches):
        outside.seen.add_(1)
        with_rule("token_mean")(model, microbatches)

    assert audit_accumulation(run, outside, minibatch_of(3, 1, 2)).ok
    assert outside.seen == 0
