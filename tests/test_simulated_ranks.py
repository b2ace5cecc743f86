"""The simulator of W ranks against definitions and against every rank run by itself."""

import pytest
import torch

from sft_edu import TinyLM, compare, full_batch_gradient, get_response_log_probs, split_minibatch
from sft_edu.ragged import ragged_minibatch
from sft_edu.ranks.simulated import RANK_DENOMINATORS, deal, microbatch_sums

RIGHT = "global_over_world"
MINIBATCH = ragged_minibatch(12, imbalance=1.0)


@pytest.fixture(scope="module")
def model():
    return TinyLM(d_model=16, num_layers=1, num_heads=2).double()


@pytest.fixture(scope="module")
def sums(model):
    return microbatch_sums(model, split_minibatch(MINIBATCH, 5))  # 3 + 3 + 2 + 2 + 2 sequences


@pytest.fixture(scope="module")
def single(model):
    return full_batch_gradient(model, MINIBATCH)


def rank_by_rank(model, microbatches, world_size, divisor_of):
    """Each rank alone, one backward for all that it holds, and the plain mean of what they have."""
    total = sum(int(batch["response_mask"].sum()) for batch in microbatches)
    gradients = []
    for rank in range(world_size):
        mine = microbatches[rank::world_size]
        tokens = sum(int(batch["response_mask"].sum()) for batch in mine)
        model.zero_grad()
        for batch in mine:
            log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
            (-log_probs[batch["response_mask"] != 0].sum() / divisor_of(tokens, total, world_size)).backward()
        gradients.append(
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
        )
    model.zero_grad()
    return sum(gradients) / world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 64])
def test_the_right_denominator_gives_the_gradient_of_one_process(sums, single, world_size):
    assert compare(deal(sums, world_size, RIGHT).gradient, single).relative_error <= 1e-14


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6, 64])
def test_every_other_one_does_not(sums, single, world_size):
    for name in RANK_DENOMINATORS.keys() - {RIGHT}:
        assert compare(deal(sums, world_size, name).gradient, single).relative_error >= 1e-2
    wrong = compare(deal(sums, world_size, "global").gradient, single)
    assert wrong.ratio == pytest.approx(1 / world_size, rel=1e-12)
    assert wrong.cosine == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize(
    ("name", "divisor_of"),
    [
        ("local", lambda n, N, W: n),
        ("local_times_world", lambda n, N, W: n * W),
        ("global", lambda n, N, W: N),
        (RIGHT, lambda n, N, W: N / W),
    ],
)
def test_it_is_what_ranks_do_one_by_one(model, sums, world_size, name, divisor_of):
    expected = rank_by_rank(model, split_minibatch(MINIBATCH, 5), world_size, divisor_of)
    assert compare(deal(sums, world_size, name).gradient, expected).relative_error <= 1e-14


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_microbatches_are_dealt_without_overlap_or_loss(sums, world_size):
    shares = deal(sums, world_size).shares
    assert [share.rank for share in shares] == list(range(world_size))
    assert sum(share.num_tokens for share in shares) == int(MINIBATCH["response_mask"].sum())
    expected = [sum([3, 3, 2, 2, 2][rank::world_size]) for rank in range(world_size)]
    assert [share.sequences for share in shares] == expected


def test_a_share_says_what_its_rank_works_out_alone(model, sums):
    share = deal(sums, 2, "local").shares[1]
    mine = [split_minibatch(MINIBATCH, 5)[index] for index in (1, 3)]
    nll, tokens, gradient = 0.0, 0, 0.0
    for batch in mine:
        log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
        nll -= log_probs[batch["response_mask"] != 0].sum().item()
        tokens += int(batch["response_mask"].sum())
        gradient = gradient + full_batch_gradient(model, batch, objective="sum")
    assert (share.sequences, share.num_tokens) == (5, tokens)
    assert share.loss == pytest.approx(nll / tokens, rel=1e-13)
    assert share.grad_norm == pytest.approx((gradient / tokens).norm().item(), rel=1e-13)


def test_an_empty_rank_has_nothing_and_counts_in_the_average(sums, single):
    result = deal(sums, 6, "local")
    empty = result.shares[5]
    assert (empty.sequences, empty.num_tokens, empty.loss, empty.grad_norm) == (0, 0, 0.0, 0.0)
    assert compare(result.gradient, deal(sums, 5, "local").gradient * 5 / 6).relative_error <= 1e-14
    assert compare(deal(sums, 6, RIGHT).gradient, single).relative_error <= 1e-14


def test_a_minibatch_without_response_tokens_has_a_gradient_of_zero(model):
    empty = {**MINIBATCH, "response_mask": torch.zeros_like(MINIBATCH["response_mask"])}
    sums = microbatch_sums(model, split_minibatch(empty, 3))
    for name in RANK_DENOMINATORS:
        result = deal(sums, 2, name)
        assert not result.gradient.any()
        assert [share.loss for share in result.shares] == [0.0, 0.0]


def test_equal_counts_hide_a_mean_of_means(model):
    minibatch = ragged_minibatch(8, imbalance=0.0)
    result = deal(microbatch_sums(model, split_minibatch(minibatch, 4)), 4, "local")
    assert compare(result.gradient, full_batch_gradient(model, minibatch)).relative_error <= 1e-14


def test_gradients_of_the_model_are_left_alone(model):
    model.head.weight.grad = kept = torch.ones_like(model.head.weight)
    microbatch_sums(model, split_minibatch(MINIBATCH, 2))
    assert model.head.weight.grad is kept
    assert kept.eq(1).all()
    model.zero_grad()


def test_it_prints_a_line_for_each_rank(sums):
    lines = repr(deal(sums, 3, "local")).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert lines[0].split("  ")[0] == "rank"
    assert lines[-1] == f"length of their average: {deal(sums, 3, 'local').gradient.norm():.4f}"


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "2", None])
def test_a_wrong_number_of_ranks_is_refused(sums, bad):
    with pytest.raises(ValueError, match=r"world_size: got .*; expected an integer of at least 1"):
        deal(sums, bad)


def test_other_bad_input_is_refused(model, sums):
    with pytest.raises(ValueError, match="denominator: got 'mean'; expected one of local, "):
        deal(sums, 2, "mean")
    with pytest.raises(ValueError, match="microbatches: got none"):
        microbatch_sums(model, [])
    with pytest.raises(ValueError, match="microbatches: got a single batch"):
        microbatch_sums(model, MINIBATCH)
