"""A wrong denominator under torch's own optimizers, beside loops written by hand and beside the formula.

The right gradient is as long as 0.165 at the start. Numbers in the tests were measured.
"""

import itertools

import pytest
import torch
from torch import nn

from sft_edu import accumulate, compare, split_minibatch
from sft_edu.optimizer_runs import (
    BUGS,
    OPTIMIZERS,
    SEQUENCES,
    STEPS,
    outcome,
    pair_weights,
    predicted,
    run_optimizer,
    vocabulary,
)
from sft_edu.ragged import ragged_minibatch

LR, G = 0.01, 8
TOKENS = 192


def run(bug, optimizer, steps=STEPS, g=G, lr=LR, **settings):
    return run_optimizer(pair_weights(bug, g), optimizer, learning_rate=lr, steps=steps, **settings)


def beside(bug, optimizer, steps, g=G, **settings):
    wrong, right = run(bug, optimizer, steps, g, **settings), run(None, optimizer, steps, g, **settings)
    return outcome(wrong, right, optimizer, steps=steps, **settings)


class Table(nn.Module):
    """The same model for whole sequences: the logits after a token are its row."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(259, 259, dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        size = len(vocabulary())
        # Tokens that do not occur are impossible here; the small table does not have them at all.
        self.rows.data[:, :] = -torch.inf
        start = 2 * torch.randn(size, size, dtype=torch.float64, generator=generator)
        self.rows.data[vocabulary()[:, None], vocabulary()] = start

    def forward(self, input_ids):
        return self.rows[input_ids]


@pytest.mark.parametrize("g", [1, 3, 8])
@pytest.mark.parametrize(("bug", "rule"), [(None, "token_mean"), ("mean_of_means", "microbatch_token_mean")])
def test_the_gradient_is_what_real_microbatches_accumulate(bug, rule, g):
    model = Table()
    microbatches = split_minibatch(ragged_minibatch(SEQUENCES, imbalance=1.0), g)
    gradient = accumulate(model, response_tokens_only(microbatches), rule=rule).gradient.view(259, 259)
    inside = gradient[vocabulary()[:, None], vocabulary()]
    assert compare(run(bug, "SGD", 1, g).gradient, inside.flatten()).relative_error < 1e-14


def response_tokens_only(microbatches):
    """Prompts and padding may have tokens that the small table does not have; their logits must not be NaN."""
    some = vocabulary()[0]
    outside = [microbatch["response_mask"] == 0 for microbatch in microbatches]
    return [
        {**microbatch, **{name: microbatch[name].masked_fill(mask, some) for name in ("input_ids", "labels")}}
        for microbatch, mask in zip(microbatches, outside, strict=True)
    ]


@pytest.mark.parametrize("g", [1, 3, 8])
def test_the_other_bugs_scale_the_right_gradient(g):
    right = pair_weights(None, g)
    assert right.sum().item() == pytest.approx(1)
    for bug, factor in {"G_twice": 1 / g, "no_G": g, "no_N": TOKENS, "no_minus": -1}.items():
        torch.testing.assert_close(pair_weights(bug, g), factor * right, rtol=1e-14, atol=0)


def by_hand(optimizer, weights, steps, eps, max_norm):
    """The loop without autograd and without torch's optimizers: the change, and in which steps clipping fired."""
    size = len(weights)
    start = 2 * torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, first, second, fired = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
    for step in range(1, steps + 1):
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        gradient = weights.sum(-1, keepdim=True) * probabilities - weights
        shrink = 1.0 if max_norm is None else min(1.0, max_norm / (gradient.norm().item() + 1e-6))
        fired.append(shrink < 1)
        gradient *= shrink
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        adamw = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + eps)
        logits -= LR * (gradient if optimizer == "SGD" else adamw)
    return (logits - start).flatten(), tuple(fired)


@pytest.mark.parametrize("max_norm", [None, 0.175])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_is_that_of_a_loop_written_by_hand(optimizer, max_norm):
    """With AdamW, clipping at 0.175 fires in some of the steps only."""
    found = run("mean_of_means", optimizer, 20, eps=1e-6, max_norm=max_norm)
    assert found.change.shape == (21, len(vocabulary()) ** 2)
    for steps in (0, 1, 20):
        change, fired = by_hand(optimizer, pair_weights("mean_of_means", G), steps, 1e-6, max_norm)
        assert compare(found.change[steps], change).relative_error < 1e-10
        assert found.clipped[:steps] == fired


def test_sgd_under_a_second_division_by_g_is_sgd_with_a_learning_rate_of_one_over_g():
    bug, slower = run("G_twice", "SGD"), run(None, "SGD", lr=LR / G)
    for steps in (1, 10, 50):
        assert compare(bug.change[steps], slower.change[steps]).relative_error < 1e-9
    first = beside("G_twice", "SGD", 1)
    assert first.measured.ratio == pytest.approx(1 / G, rel=1e-11)
    assert first.is_exact


@pytest.mark.parametrize(("eps", "first", "last"), [(1e-8, 0.0174, 0.0167), (1e-4, 0.4163, 0.4159)])
def test_adamw_hides_the_scale_and_a_large_eps_shows_it(eps, first, last):
    after_1, after_50 = (beside("G_twice", "AdamW", steps, eps=eps) for steps in (1, 50))
    assert (after_1.measured.relative_error, after_50.measured.relative_error) == pytest.approx((first, last), rel=0.01)
    assert after_1.hides == after_50.hides == (eps == 1e-8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_fires_on_every_step_with_the_right_gradient_and_on_none_with_one_over_g(optimizer):
    result = beside("G_twice", optimizer, 50, max_norm=0.1)
    assert (result.right_clips, result.bug_clips) == (50, 0)
    assert result.name == f"{optimizer} + clipping"
    unclipped = beside("G_twice", optimizer, 1)
    assert (unclipped.right_clips, unclipped.bug_clips, unclipped.name) == (None, None, optimizer)


@pytest.mark.parametrize("bug", ["no_G", "no_N"])
def test_clipping_that_always_fires_hides_a_gradient_that_is_too_long(bug):
    assert beside(bug, "SGD", 50, max_norm=0.1).hides
    assert not beside(bug, "SGD", 50).hides


def test_no_optimizer_hides_a_wrong_direction():
    for optimizer, max_norm, steps in itertools.product(OPTIMIZERS, (None, 0.1), (1, 50)):
        result = beside("mean_of_means", optimizer, steps, max_norm=max_norm)
        assert result.measured.ratio == pytest.approx(1, abs=0.1)
        assert result.measured.cosine < 0.99
        assert not result.hides


@pytest.mark.parametrize("bug", BUGS)
def test_the_formula_says_the_first_step_of_every_optimizer(bug):
    for optimizer, max_norm, eps, g in itertools.product(OPTIMIZERS, (None, 0.03, 0.1), (1e-8, 1e-4), (2, 8)):
        result = beside(bug, optimizer, 1, g, eps=eps, max_norm=max_norm)
        assert result.measured.ratio == pytest.approx(result.predicted.ratio, rel=1e-10)
        assert result.measured.cosine == pytest.approx(result.predicted.cosine, abs=1e-10)
        assert result.is_exact


def test_the_formula_of_the_first_step_is_not_that_of_fifty():
    result = beside("no_G", "SGD", 50)
    assert result.predicted.ratio == pytest.approx(8)
    assert result.measured.ratio == pytest.approx(7.8895, abs=1e-4)
    assert not result.is_exact


def test_the_formula_needs_no_run():
    gradient, reference = torch.tensor([0.03, -0.04]), torch.tensor([3.0, -4.0])
    assert predicted(gradient, reference, "SGD").ratio == pytest.approx(0.01)
    assert predicted(gradient, reference, "SGD", max_norm=0.5).ratio == pytest.approx(0.1)
    assert predicted(gradient, reference, "AdamW", eps=0).ratio == 1
    assert predicted(gradient, reference, "AdamW", eps=1.0).ratio < 0.1


def test_a_run_is_the_same_in_every_mood_of_its_thread():
    expected = run("no_G", "AdamW", 3, max_norm=0.1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again = run("no_G", "AdamW", 3, max_norm=0.1)
    assert again.change.equal(expected.change)
    assert again.clipped == expected.clipped


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer: got 'Adam'; expected one of SGD, AdamW"):
        run(None, "Adam")
