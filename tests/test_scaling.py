"""What each rule divides by, and what its gradients add up to over several microbatches."""

import itertools

import pytest
import torch

from sft_edu import RULES, sft_microbatch_train_step
from sft_edu.scaling import Rule

LENGTHS = [1, 12, 2, 20, 3, 7, 16, 40]  # response tokens of eight sequences, neighbours at least 2:1 apart
PROMPT = 2


def minibatch(lengths):
    """A parameter per token, log-probs that are a nonlinear function of it, and the mask."""
    mask = torch.zeros(len(lengths), PROMPT + max(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, PROMPT : PROMPT + length] = True
    generator = torch.Generator().manual_seed(0)
    parameter = torch.rand(mask.shape[1], generator=generator, dtype=torch.float64).requires_grad_()
    features = torch.rand(mask.shape, generator=generator, dtype=torch.float64) + 0.5
    return parameter, features, mask


def log_probs_of(parameter, features):
    return -torch.nn.functional.softplus(parameter * features)


def accumulated(lengths, split, rule, constant=1.0):
    """The gradient that the step accumulates over microbatches of `split` sequences each."""
    parameter, features, mask = minibatch(lengths)
    for rows in torch.arange(len(lengths)).split(split):
        sft_microbatch_train_step(
            log_probs_of(parameter, features[rows]),
            mask[rows],
            len(split),
            constant,
            rule=rule,
            minibatch_tokens=sum(lengths),
        )
    return parameter.grad


def reference(lengths, loss):
    """The gradient of `loss(log_probs, mask)` over all sequences at once, by autograd alone."""
    parameter, features, mask = minibatch(lengths)
    loss(log_probs_of(parameter, features), mask).backward()
    return parameter.grad


def per_token_mean(log_probs, mask):
    return -log_probs[mask].mean()


def per_sequence_mean(log_probs, mask):
    return -(log_probs * mask).sum(1).mean()


def error(gradient, expected):
    return ((gradient - expected).norm() / expected.norm()).item()


def compositions(total):
    """Every way to cut a row of `total` sequences into microbatches: 2**(total - 1)."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        edges = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), total]
        yield [end - start for start, end in itertools.pairwise(edges)]


FORMULAS = {
    "notes": ("c·G²", lambda n, total: 2.5 * 4**2),
    "microbatch_mean": ("c·G", lambda n, total: 2.5 * 4),
    "sequence_mean": ("c·B·G", lambda n, total: 2.5 * 3 * 4),
    "microbatch_token_mean": ("n·G", lambda n, total: n * 4),
    "token_mean": ("N", lambda n, total: total),
}


def test_every_rule_is_described_in_the_order_of_the_lessons():
    assert {name: rule.formula for name, rule in RULES.items()} == {
        name: formula for name, (formula, _) in FORMULAS.items()
    }
    assert all(rule.name == name and rule.used_by and rule.accumulates_to for name, rule in RULES.items())
    assert all(rule.needs_minibatch_tokens == ("N" in FORMULAS[name][0]) for name, rule in RULES.items())


def test_a_formula_has_each_symbol_once():
    formulas = {"111": "1", "11c": "c", "NG1": "N·G", "GGc": "c·G²", "nG1": "n·G"}
    for (first, second, constant), formula in formulas.items():
        assert Rule("mine", first, second, constant == "c", "nobody", "nothing").formula == formula


def test_the_rules_are_read_only():
    with pytest.raises(TypeError, match="does not support item assignment"):
        RULES["mine"] = RULES["notes"]
    with pytest.raises(AttributeError, match="cannot assign"):
        RULES["notes"].first = "1"


@pytest.mark.parametrize("rule", RULES)
def test_each_microbatch_is_divided_by_the_formula(rule):
    lengths, total = [2, 9, 4], 40  # B = 3, G = 4, c = 2.5
    denominator = FORMULAS[rule][1](sum(lengths), total)
    _, _, mask = minibatch(lengths)
    log_probs = (-torch.rand(mask.shape, dtype=torch.float64)).requires_grad_()
    loss, metadata = sft_microbatch_train_step(log_probs, mask, 4, 2.5, rule=rule, minibatch_tokens=total)
    torch.testing.assert_close(log_probs.grad, -mask.double() / denominator, rtol=1e-14, atol=0)
    torch.testing.assert_close(loss, -log_probs.detach()[mask].sum() / denominator, rtol=1e-14, atol=0)
    assert metadata["denominator"].item() == pytest.approx(denominator, rel=1e-15)


EQUALS = {
    "notes": lambda x, m: sum(-(x * m).reshape(4, -1).sum(1)) / 4 / 4,
    "microbatch_mean": lambda x, m: -(x * m).reshape(4, -1).sum(1).mean(),
    "sequence_mean": per_sequence_mean,
    "microbatch_token_mean": lambda x, m: -((x * m).view(4, -1).sum(1) / m.view(4, -1).sum(1)).mean(),
    "token_mean": per_token_mean,
}


@pytest.mark.parametrize("rule", RULES)
def test_four_microbatches_accumulate_to_what_the_rule_says_and_to_nothing_else(rule):
    lengths = [1, 9, 2, 12, 3, 7, 4, 16, 1, 5, 2, 30]  # B = 3, G = 4
    gradient = accumulated(lengths, [3] * 4, rule)
    errors = {name: error(gradient, reference(lengths, loss)) for name, loss in EQUALS.items()}
    assert errors.pop(rule) <= 1e-14
    assert min(errors.values()) >= 1e-2


def test_token_mean_is_the_full_batch_gradient_for_every_split_of_eight_sequences():
    full_batch = reference(LENGTHS, per_token_mean)
    splits = list(compositions(8))
    assert len(splits) == 128
    assert max(error(accumulated(LENGTHS, split, "token_mean"), full_batch) for split in splits) <= 1e-14
    mean_of_means = [error(accumulated(LENGTHS, split, "microbatch_token_mean"), full_batch) for split in splits[1:]]
    assert min(mean_of_means) >= 1e-2  # the wrong rule is wrong in every split but the one of a single microbatch


def test_sequence_mean_is_the_full_batch_gradient_where_all_microbatches_are_equally_large():
    full_batch = reference(LENGTHS, per_sequence_mean)
    for split in compositions(8):
        off = error(accumulated(LENGTHS, split, "sequence_mean"), full_batch)
        assert off <= 1e-14 if len(set(split)) == 1 else off >= 1e-2, split


@pytest.mark.parametrize(
    ("rule", "lengths", "split", "loss", "share"),
    [
        ("notes", [1, 1], [1, 1], per_sequence_mean, 1 / 2),
        ("microbatch_mean", [1, 1], [2], per_sequence_mean, 2),
        ("sequence_mean", [1, 1, 1], [1, 2], per_sequence_mean, None),
        ("microbatch_token_mean", [1, 2], [1, 1], per_token_mean, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_smallest_minibatch_on_which_the_rule_is_not_the_full_batch(rule, lengths, split, loss, share):
    gradient, full_batch = accumulated(lengths, split, rule), reference(lengths, loss)
    assert error(gradient, full_batch) >= 1e-2
    if share is not None:
        torch.testing.assert_close(gradient, full_batch * share, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_the_constant_divides_the_rules_that_have_it_and_leaves_the_token_means_alone(rule):
    plain, divided = (accumulated(LENGTHS, [3, 5], rule, constant) for constant in (1.0, 2.5))
    expected = plain / 2.5 if RULES[rule].uses_constant else plain
    torch.testing.assert_close(divided, expected, rtol=1e-14, atol=0)
