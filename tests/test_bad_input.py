"""Whatever a naive step computes silently from bad input is refused here, and `.grad` stays as it was."""

import inspect
import math
import re
import warnings

import numpy as np
import pytest
import torch

from sft_edu import RULES, PositiveLogProbWarning, Trace, checks, raise_for_bad_values, sft_microbatch_train_step

NAN, INF = math.nan, math.inf
MASK = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]  # six tokens, not symmetric
GIVEN_GRAD = torch.linspace(-1, 1, 9).view(3, 3)


def log_probs(second, others=-1.0, dtype=torch.float32):
    """Log-probs that already have a gradient; the second of the first sequence is under the mask."""
    values = torch.full((3, 3), others, dtype=dtype)
    values[0, 1] = second
    values.requires_grad_().grad = GIVEN_GRAD.to(dtype, copy=True)
    return values


def step(log_probs, **change):
    arguments = {"response_mask": torch.tensor(MASK), "gradient_accumulation_steps": 2}
    return sft_microbatch_train_step(**{"policy_log_probs": log_probs} | arguments | change)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def mask(value, dtype=None):
    """A good mask with one bad value in it."""
    mask = torch.tensor(MASK, dtype=dtype or torch.float32)
    mask[1, 1] = value
    return mask


T, V = TypeError, ValueError
# For each argument: a value, and the error that refuses it.
REFUSED = {
    "response_mask": [
        (torch.ones(3), V, "shape [3]; expected [3, 3]"),
        (torch.ones(1), V, "shape [1]; expected [3, 3]"),
        (torch.ones(()), V, "shape []; expected [3, 3]"),
        (torch.ones(1, 3), V, "shape [1, 3]; expected [3, 3]"),
        (torch.ones(3, 1), V, "shape [3, 1]; expected [3, 3]"),
        (torch.ones(2, 3, 3), V, "shape [2, 3, 3]; expected [3, 3]"),
        (mask(NAN), V, "nan at [1, 1]; expected 1"),
        (mask(INF), V, "inf at [1, 1]; expected 1"),
        (mask(0.5), V, "0.5 at [1, 1]; expected 1"),
        (2 * mask(0), V, "2 at [0, 0]; expected 1"),
        (mask(-100, torch.int64), V, "-100 at [1, 1]; expected 1"),
        (mask(255, torch.uint8), V, "255 at [1, 1]; expected 1"),
        (mask(0).requires_grad_(), V, "a tensor that requires grad; expected a constant"),
        (mask(0).to(torch.complex64), T, "dtype torch.complex64; expected one of bool"),
        (mask(0).to_sparse(), T, "layout torch.sparse_coo; expected a dense tensor"),
        (mask(0).to("meta"), V, "device meta; expected cpu"),
        (MASK, T, f"{MASK} (list); expected a torch.Tensor"),
    ],
    "gradient_accumulation_steps": [
        (0, V, "0; expected an integer from 1"),
        (-2, V, "-2; expected an integer from 1"),
        (10**5000, V, "an integer of 16610 bits; expected an integer from 1"),
        (False, T, "False (bool); expected an integer"),
        (True, T, "True (bool); expected an integer"),
        (torch.tensor(True), T, "tensor(True) (Tensor); expected an integer"),
        (torch.tensor([2, 2]), T, "tensor([2, 2]) (Tensor); expected an integer"),
        (2.0, T, "2.0 (float); expected an integer"),
        (2.5, T, "2.5 (float); expected an integer"),
        ("2", T, "'2' (str); expected an integer"),
        (None, T, "None (NoneType); expected an integer"),
    ],
    "normalize_constant": [
        (0, V, "0.0; expected a number above 0"),
        (NAN, V, "nan; expected a number above 0"),
        (INF, V, "inf; expected a number above 0"),
        (-1, V, "-1.0; expected a number above 0"),
        (1e-320, V, "1e-320; expected a number above 0"),
        (1e-37, V, "1e-37; expected a number above 0"),
        (10**400, V, "inf; expected a number above 0"),
        (np.float32(0), V, "0.0; expected a number above 0"),
        (True, T, "True (bool); expected a Python number"),
        (torch.tensor(1.0), T, "tensor(1.) (Tensor); expected a Python number"),
        ("1", T, "'1' (str); expected a Python number"),
        (None, T, "None (NoneType); expected a Python number"),
    ],
    "minibatch_tokens": [
        (None, V, "None; expected the response tokens"),
        (0, V, "0; expected an integer from 1"),
        (5, V, "0 or fewer than this microbatch's own response tokens; expected"),
        (7.0, T, "7.0 (float); expected an integer"),
        (True, T, "True (bool); expected an integer"),
        (torch.tensor(7.0), T, "tensor(7.) (Tensor); expected an integer"),
    ],
    "policy_log_probs": [
        (log_probs(NAN), V, "nan at [0, 1]; expected finite values"),
        (log_probs(INF), V, "inf at [0, 1]; expected finite values"),
        (log_probs(-INF), V, "-inf at [0, 1]; expected finite values"),
        (log_probs(-3e38, -3e38), V, "values whose sum is not finite; expected finite values"),
        (log_probs(-1).detach(), V, "a tensor without gradient; expected requires_grad=True"),
        (torch.tensor(MASK), T, "dtype torch.int64; expected one of float16"),
        (MASK, T, f"{MASK} (list); expected a torch.Tensor"),
    ],
    "rule": [
        ("mean", V, "'mean' (str); expected one of notes, microbatch_mean"),
        (["notes"], V, "['notes'] (list); expected one of notes, microbatch_mean"),
    ],
    "tap": [(None, T, "None (NoneType); expected a callable")],
}


@pytest.mark.parametrize(
    ("argument", "value", "error", "text"),
    [
        pytest.param(argument, *case, id=f"{argument} {case[-1].partition(';')[0]}")
        for argument, cases in REFUSED.items()
        for case in cases
    ],
)
def test_bad_input_is_named_and_leaves_the_gradient_alone(argument, value, error, text):
    given = value if argument == "policy_log_probs" and isinstance(value, torch.Tensor) else log_probs(-1)
    before = None if given.grad is None else given.grad.clone()
    rule = {"rule": "token_mean"} if argument == "minibatch_tokens" else {}
    with pytest.raises(error) as raised:
        step(given, **rule | {argument: value})
    assert str(raised.value).startswith(f"{argument}: got {text}")
    assert before is None or torch.equal(bits(given.grad), bits(before))


@pytest.mark.parametrize("shape", [[3], [0, 3], [3, 0], [1, 3, 3]], ids=str)
def test_log_probs_have_a_row_per_sequence_and_a_column_per_token(shape):
    given = torch.ones(shape, requires_grad=True)
    with pytest.raises(ValueError, match=rf"^policy_log_probs: got shape {re.escape(str(shape))}; expected \[B, T\]"):
        step(given, response_mask=torch.ones(shape))
    assert given.grad is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"gradient_accumulation_steps": 2**53},
            "normalize_constant and gradient_accumulation_steps: got 1 and 9.0072e",
        ),
        ({"normalize_constant": 1e-9}, "normalize_constant and gradient_accumulation_steps: got 1e-09 and 2, under"),
        ({"minibatch_tokens": 2**53, "rule": "token_mean"}, "minibatch_tokens: got 9.0072e+15, under rule"),
    ],
    ids=["G", "c", "N"],
)
def test_a_gradient_that_float16_cannot_hold_is_refused(change, text):
    given = log_probs(-1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"expected one that torch.float16 can hold$") as raised:
        step(given, **change)
    assert str(raised.value).startswith(text)
    assert torch.equal(given.grad, GIVEN_GRAD.half())


def test_a_step_without_gradient_is_refused_under_no_grad():
    with torch.no_grad(), pytest.raises(ValueError, match=r"outside torch.no_grad\(\)"):
        step(log_probs(-1))


def test_the_transpose_of_a_square_mask_cannot_be_told_from_a_mask_and_is_taken_as_one():
    given = log_probs(-1)
    step(given, response_mask=torch.tensor(MASK).T)
    assert torch.equal(given.grad - GIVEN_GRAD != 0, torch.tensor(MASK).T != 0)


@pytest.mark.parametrize(
    "steps", [np.int8(16), np.int64(16), torch.tensor(16, dtype=torch.int8), torch.tensor([16])], ids=repr
)
def test_any_integer_is_taken_as_g_and_does_not_overflow_when_squared(steps):
    given = log_probs(-1)
    given.grad = None
    _, metadata = step(given, gradient_accumulation_steps=steps)
    assert metadata["denominator"].item() == 256  # 0 in int8
    assert torch.equal(given.grad, -torch.tensor(MASK) / 256)


@pytest.mark.parametrize("rule", RULES)
def test_positive_log_probs_warn_at_the_line_of_the_caller_and_are_computed_all_the_same(rule):
    given = log_probs(0.5)
    with pytest.warns(PositiveLogProbWarning, match=r"^policy_log_probs: got 0.5 at \[0, 1\]; a log-prob") as caught:
        step(given, rule=rule, minibatch_tokens=6)
    lines, start = inspect.getsourcelines(step)
    assert caught[0].filename == __file__
    assert start <= caught[0].lineno < start + len(lines)
    assert torch.equal(given.grad < GIVEN_GRAD, torch.tensor(MASK) == 1)


def test_the_warning_can_be_silenced_and_what_the_mask_hides_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(log_probs(0.5), response_mask=torch.tensor([[1, 0, 1]] * 3))
        warnings.simplefilter("ignore", PositiveLogProbWarning)
        step(log_probs(0.5))


@pytest.mark.parametrize("tokens", [9, torch.tensor(9, device="meta")], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_on_an_accelerator_no_value_is_read_back_to_the_host(rule, dtype, tokens):
    """A meta tensor has no values: whatever reads one raises."""
    given = torch.empty(3, 3, dtype=dtype, device="meta", requires_grad=True)
    mask = torch.empty(3, 3, device="meta")
    loss, metadata = step(given * 2, response_mask=mask, rule=rule, minibatch_tokens=tokens, tap=Trace())
    assert loss.is_meta
    assert all(value.is_meta and value.ndim == 0 for value in metadata.values())
    assert (given.grad.shape, given.grad.dtype) == (given.shape, dtype)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        raise_for_bad_values(metadata)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "text"),
    [
        ((), torch.float32, T, r"a tensor, torch.float32 of shape \[\]; expected an integer"),
        ((1,), torch.int64, T, r"a tensor, torch.int64 of shape \[1\]; expected an integer"),
        ((), torch.int64, V, "device meta; expected cpu"),
    ],
)
def test_a_token_count_on_an_accelerator_is_one_integer_beside_the_log_probs(shape, dtype, error, text):
    tokens = torch.empty(shape, dtype=dtype, device="meta")
    with pytest.raises(error, match=f"^minibatch_tokens: got {text}"):
        step(log_probs(-1), minibatch_tokens=tokens, rule="token_mean")


@pytest.fixture
def like_an_accelerator(monkeypatch):
    """The CPU, treated like a device on which nothing may be read before the optimizer step."""
    monkeypatch.setattr(checks, "values_are_read", lambda device: False)
    monkeypatch.setattr(checks, "check_minibatch_tokens", lambda tokens, rule, device: tokens)


@pytest.mark.usefixtures("like_an_accelerator")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("response_mask", {"response_mask": mask(0.5)}),
        ("response_mask", {"response_mask": mask(NAN)}),
        ("policy_log_probs", {"second": NAN}),
        ("policy_log_probs", {"second": -INF}),
        ("policy_log_probs", {"second": -3e38, "others": -3e38}),
        ("minibatch_tokens", {"minibatch_tokens": torch.tensor(5)}),
        ("minibatch_tokens", {"minibatch_tokens": torch.tensor(0)}),
        ("minibatch_tokens", {"minibatch_tokens": torch.tensor(0), "response_mask": torch.zeros(3, 3)}),
    ],
    ids=["mask 0.5", "mask NaN", "log-prob NaN", "log-prob -inf", "overflow", "N < n", "N = 0", "N = n = 0"],
)
def test_on_an_accelerator_a_bad_microbatch_contributes_nothing_and_raises_later(argument, change, rule):
    usual = {"minibatch_tokens": torch.tensor(9), "rule": rule}
    _, good = step(log_probs(-1), **usual)
    change = usual | change
    given = log_probs(change.pop("second", -1.0), change.pop("others", -1.0))
    _, bad = step(given, **change)
    assert torch.equal(bits(given.grad), bits(GIVEN_GRAD))
    raise_for_bad_values(good, good)
    with pytest.raises(ValueError, match=f"^{argument}: got .* in microbatch 1; expected"):
        raise_for_bad_values(good, bad, good)
    with pytest.raises(ValueError, match=f"^{argument}: got (?!.* in microbatch).*; expected"):
        raise_for_bad_values(bad)


@pytest.mark.usefixtures("like_an_accelerator")
def test_on_an_accelerator_a_minibatch_without_any_token_adds_no_nan():
    empty = {"response_mask": torch.zeros(3, 3), "minibatch_tokens": torch.tensor(0), "rule": "token_mean"}
    given = log_probs(-1)
    loss, _ = step(given, **empty)
    assert loss.item() == 0
    assert torch.equal(given.grad, GIVEN_GRAD)


@pytest.mark.usefixtures("like_an_accelerator")
def test_on_an_accelerator_positive_log_probs_warn_later_at_the_line_of_the_caller():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, metadata = step(log_probs(0.5))
    with pytest.warns(PositiveLogProbWarning, match="^policy_log_probs: got positive values") as caught:
        raise_for_bad_values(metadata)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("metadata", [(), ({},), ([{}],)], ids=["nothing", "no flags", "a list"])
def test_raise_for_bad_values_says_what_it_wants(metadata):
    with pytest.raises(TypeError, match=r"^metadata: got .*; expected "):
        raise_for_bad_values(*metadata)
