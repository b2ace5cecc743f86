"""The gradients by hand and the gradients of autograd: two authors, one answer."""

import ast
import inspect
import random

import pytest
import torch

from sft_edu import RULES, closed_form, sft_microbatch_train_step

CASES = (*range(40), 2425)  # in the last one a label is almost certain


def random_case(seed):
    """Logits `[B, T, V]`, labels, a mask and the numbers of one microbatch."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(choose.randrange(2**32))
    batch, length, vocabulary = choose.randint(1, 5), choose.randint(1, 12), choose.randint(2, 30)
    logits = torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64) * choose.choice([1, 10])
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < choose.choice([0.2, 0.6, 1])
    return logits, labels, mask, choose.randint(1, 17), choose.choice([1.0, 0.3, 7.7]), choose.randint(60, 500)


def log_probs_of(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def assert_agree(autograd, by_hand, terms=0):
    """Up to rounding: of the result, and of terms of this norm that may cancel in it."""
    assert (autograd - by_hand).norm() <= 1e-14 * (by_hand.norm() + terms)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", CASES)
def test_autograd_agrees_with_the_gradients_by_hand(rule, seed):
    logits, labels, mask, steps, constant, tokens = random_case(seed)
    logits.requires_grad_()
    log_probs = log_probs_of(logits, labels)
    log_probs.retain_grad()
    loss, metadata = sft_microbatch_train_step(log_probs, mask, steps, constant, rule=rule, minibatch_tokens=tokens)
    denominator = closed_form.denominator(rule, mask, steps, constant, tokens)
    assert metadata["denominator"].item() == pytest.approx(denominator, rel=1e-15)
    assert_agree(loss, closed_form.loss(log_probs, mask, denominator))
    assert not log_probs.grad[~mask].any()
    assert not logits.grad[~mask].any()
    assert_agree(log_probs.grad, closed_form.grad_log_probs(mask, denominator, torch.float64))
    terms = mask.sum() ** 0.5 / denominator  # softmax - 1, where the label is almost certain
    assert_agree(logits.grad, closed_form.grad_logits(logits, labels, mask, denominator), terms)


@pytest.mark.parametrize("seed", range(5))
def test_finite_differences_agree_with_what_autograd_differentiates(seed):
    logits, labels, mask, *_ = random_case(seed)
    logits, labels, mask = logits[:2, :4, :5], labels[:2, :4] % 5 % logits.shape[-1], mask[:2, :4]

    def loss(logits):
        return -(log_probs_of(logits, labels) * mask).sum() / 3

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    [autograd] = torch.autograd.grad(loss(logits), logits)
    assert_agree(autograd, closed_form.grad_logits(logits, labels, mask, 3), mask.sum() ** 0.5 / 3)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"^rule: got 'mean'; expected the name of a rule"):
        closed_form.denominator("mean", torch.ones(1, 1), 1)


def test_the_closed_form_uses_nothing_of_the_step_and_no_autograd():
    tree = ast.parse(inspect.getsource(closed_form))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"__future__", "torch"}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"autograd", "backward", "grad", "requires_grad", "requires_grad_"}
