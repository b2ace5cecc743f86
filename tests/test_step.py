"""The contract of the step and of its masked sum, on numbers small enough to check by hand."""

import math

import pytest
import torch

from sft_edu import RULES, PositiveLogProbWarning, masked_normalize, sft_microbatch_train_step

LOG_PROBS = [[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]]
MASK = [[1, 1, 0, 1], [1, 1, 1, 1]]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
every_rule = pytest.mark.parametrize("rule", RULES)


def leaf(values, dtype=torch.float64):
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def test_the_worked_example_is_exact():
    log_probs = leaf(LOG_PROBS)
    loss, metadata = sft_microbatch_train_step(log_probs, torch.tensor(MASK), 2)
    assert (loss.item(), metadata["loss"].item()) == (0.7, 1.4)
    assert (metadata["num_tokens"].item(), metadata["masked_sum"].item()) == (7, -2.8)
    assert metadata["denominator"].item() == 4
    assert log_probs.grad.tolist() == [[-0.25, -0.25, 0, -0.25], [-0.25] * 4]
    assert {name: value.ndim for name, value in metadata.items()} == dict.fromkeys(metadata, 0)
    assert metadata["num_tokens"].dtype == torch.int64


def test_the_second_example_gives_plus_a_fortieth_and_warns_of_positive_log_probs():
    log_probs = leaf([[1.0, 0.5, -0.3, -0.8], [0.2, -0.4, -0.6, -0.2]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])  # masked sum 1.0 + 0.5 - 0.8 + 0.2 - 0.4 - 0.6 = -0.1
    with pytest.warns(PositiveLogProbWarning):
        loss, _ = sft_microbatch_train_step(log_probs, mask, 2)
    assert loss.item() == pytest.approx(0.025, rel=1e-14)


def test_repeated_calls_add_up_and_nothing_is_zeroed():
    log_probs = leaf(LOG_PROBS)
    log_probs.grad = torch.ones_like(log_probs)
    for call in range(1, 4):
        sft_microbatch_train_step(log_probs, torch.tensor(MASK), 2)
        assert torch.equal(log_probs.grad, 1 - 0.25 * call * torch.tensor(MASK))


@every_rule
def test_nothing_returned_holds_a_graph(rule):
    loss, metadata = sft_microbatch_train_step(leaf(LOG_PROBS), torch.tensor(MASK), 2, rule=rule, minibatch_tokens=9)
    for tensor in (loss, *metadata.values()):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 10, 49, 97])
@pytest.mark.parametrize("constant", [1.0, 0.3, 2.5, 7, 11.1])
def test_the_gradient_is_minus_one_over_g_over_g_over_c_to_the_bit(steps, constant, dtype):
    log_probs = leaf(LOG_PROBS, dtype)
    sft_microbatch_train_step(log_probs, torch.tensor(MASK), steps, constant)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    gradient = ((torch.tensor(-1.0, dtype=sum_dtype) / steps) / steps) / constant
    assert torch.equal(log_probs.grad, torch.tensor(MASK) * gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_the_loss_is_within_four_eps_of_the_exact_sum(seed, dtype):
    log_probs = leaf(-torch.rand(7, 501, generator=torch.Generator().manual_seed(seed)).exp(), dtype)
    mask = torch.rand(7, 501, generator=torch.Generator().manual_seed(-seed)) < 0.7
    loss, _ = sft_microbatch_train_step(log_probs, mask, 1)
    selected = log_probs[mask].tolist()
    assert abs(loss.item() + math.fsum(selected)) <= 4 * torch.finfo(dtype).eps * math.fsum(map(abs, selected))


def test_the_gradient_reaches_parameters_through_log_probs_that_are_not_a_leaf():
    parameter = leaf(LOG_PROBS)
    log_probs = parameter * 3
    sft_microbatch_train_step(log_probs, torch.tensor(MASK), 2)
    assert torch.equal(parameter.grad, -0.75 * torch.tensor(MASK))
    assert log_probs.is_leaf is False


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, *FLOATS], ids=str)
def test_a_mask_means_the_same_in_every_dtype(dtype):
    results = []
    for mask in (torch.tensor(MASK), torch.tensor(MASK).to(dtype)):
        log_probs = leaf(LOG_PROBS, torch.float32)
        loss, metadata = sft_microbatch_train_step(log_probs, mask, 3, 0.7)
        results.append((loss, *metadata.values(), log_probs.grad))
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(*results, strict=True))


def test_a_bfloat16_mask_counts_1001_tokens_as_1001():
    mask = torch.ones(1, 1001, dtype=torch.bfloat16)
    assert mask.sum().item() == 1000  # what a sum in bfloat16 makes of them
    _, metadata = sft_microbatch_train_step(leaf(-torch.ones(1, 1001)), mask, 1)
    assert metadata["num_tokens"].item() == 1001


@pytest.mark.parametrize(
    ("dtype", "value", "tokens"), [(torch.float16, -90, 1001), (torch.bfloat16, -1, 1001)], ids=str
)
def test_half_precision_is_added_up_in_single(dtype, value, tokens):
    values = torch.full((1, tokens), value, dtype=dtype)
    exact = -value * tokens
    assert -values.sum().item() != exact  # infinite in float16, 1000 in bfloat16
    loss, metadata = sft_microbatch_train_step(values.requires_grad_(), torch.ones(1, tokens), 1)
    assert (loss.item(), metadata["masked_sum"].item()) == (exact, -exact)
    assert loss.dtype == metadata["masked_sum"].dtype == torch.float32
    assert masked_normalize(values, torch.ones(1, tokens)).item() == -exact


@every_rule
@pytest.mark.parametrize("hidden", [math.nan, -math.inf, math.inf])
def test_what_the_mask_hides_changes_neither_loss_nor_gradient(hidden, rule):
    results = []
    for value in (-0.8, hidden):
        log_probs = leaf([[-0.5, -0.3, value, -0.2], LOG_PROBS[1]])
        loss, _ = sft_microbatch_train_step(log_probs, torch.tensor(MASK), 3, rule=rule, minibatch_tokens=9)
        results.append((loss, log_probs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][1][0, 2] == 0


@every_rule
def test_a_microbatch_without_response_tokens_contributes_exactly_nothing(rule):
    log_probs = leaf([[-0.5, math.nan], [-math.inf, -0.3]])
    before = torch.tensor([[0.1, -0.2], [0.3, -0.4]], dtype=torch.float64)
    log_probs.grad = before.clone()
    loss, metadata = sft_microbatch_train_step(log_probs, torch.zeros(2, 2), 3, rule=rule, minibatch_tokens=9)
    assert str(loss.item()) == str(metadata["loss"].item()) == "0.0"  # and not "-0.0"
    assert (metadata["num_tokens"], metadata["masked_sum"]) == (0, 0)
    assert torch.equal(log_probs.grad, before)


@pytest.mark.parametrize(
    ("dim", "sums"),
    [
        (None, -2.8),
        (0, [-0.9, -0.9, -0.3, -0.7]),
        (1, [-1.0, -1.8]),
        (-1, [-1.0, -1.8]),
        (-2, [-0.9, -0.9, -0.3, -0.7]),
        ((0, 1), -2.8),
        ((-1, 0), -2.8),
        ((1,), [-1.0, -1.8]),
    ],
    ids=str,
)
def test_masked_normalize_sums_over_dim_and_divides_once(dim, sums):
    result = masked_normalize(leaf(LOG_PROBS), torch.tensor(MASK), dim, 2.5)
    torch.testing.assert_close(result, torch.tensor(sums, dtype=torch.float64) / 2.5, rtol=1e-15, atol=0)
    assert result.requires_grad


def test_masked_normalize_keeps_the_other_dimensions_and_ignores_what_is_masked():
    tensor = torch.arange(24.0).view(2, 3, 4)
    mask = torch.ones_like(tensor, dtype=torch.bool)
    mask[:, 1] = False
    expected = (tensor[:, 0] + tensor[:, 2]) / 4
    tensor[:, 1] = math.nan
    assert torch.equal(masked_normalize(tensor, mask, 1, 4), expected)
    assert masked_normalize(tensor, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tensor": [1.0]}, TypeError, r"^tensor: got \[1.0\] \(list\); expected"),
        ({"tensor": torch.tensor(MASK)}, TypeError, "^tensor: got dtype torch.int64; expected"),
        ({"mask": torch.ones(4)}, ValueError, r"^mask: got shape \[4\]; expected \[2, 4\]"),
        ({"mask": torch.full((2, 4), 2)}, ValueError, "^mask: got values other than 0 and 1; expected"),
        ({"mask": torch.full((2, 4), math.nan)}, ValueError, "^mask: got values other than 0 and 1; expected"),
        ({"dim": 2}, ValueError, "^dim: got 2; expected"),
        ({"dim": -3}, ValueError, "^dim: got -3; expected"),
        ({"dim": (0, -2)}, ValueError, r"^dim: got \(0, -2\); expected"),
        ({"dim": ()}, ValueError, r"^dim: got \(\); expected"),
        ({"dim": 1.0}, TypeError, r"^dim: got 1.0 \(float\); expected"),
        ({"dim": True}, TypeError, r"^dim: got True \(bool\); expected"),
        ({"normalize_constant": 0}, ValueError, "^normalize_constant: got 0.0; expected"),
        ({"normalize_constant": "1"}, TypeError, r"^normalize_constant: got '1' \(str\); expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_masked_normalize_says_what_is_wrong(change, error, text):
    with pytest.raises(error, match=text):
        masked_normalize(**{"tensor": leaf(LOG_PROBS), "mask": torch.tensor(MASK)} | change)


def test_a_nan_of_the_model_where_the_mask_is_0_gets_the_gradient_0_and_still_spoils_the_parameters():
    weight = torch.ones(2, requires_grad=True)
    inputs = torch.tensor([[-0.5, torch.nan]])
    log_probs = inputs * weight
    log_probs.retain_grad()
    loss, _ = sft_microbatch_train_step(log_probs, torch.tensor([[1, 0]]), 1)
    assert loss.item() == 0.5
    assert log_probs.grad.tolist() == [[-1, 0]]
    assert weight.grad.isnan().tolist() == [False, True]
