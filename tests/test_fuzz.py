"""Any arguments at all: a step agrees with the closed form, or says what is wrong and changes nothing."""

import inspect
import math
import warnings
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, event, given, settings

from sft_edu import RULES, PositiveLogProbWarning, Trace, closed_form, no_tap, sft_microbatch_train_step

NAN, INF = math.nan, math.inf
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MASKS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS]
NAMES = tuple(inspect.signature(sft_microbatch_train_step).parameters)

reproducible = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [*HealthCheck]}
shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))


def one_of(*values):
    return st.sampled_from(values)


def tensors(shape, dtype, values):
    count = math.prod(shape)
    return st.lists(values, min_size=count, max_size=count).map(
        lambda drawn: torch.tensor(drawn, dtype=torch.float64).view(shape).to(dtype)
    )


@st.composite
def valid(draw):
    """Arguments in their range, in all the forms that are allowed."""
    shape, dtype = draw(shapes), draw(one_of(*FLOATS))
    log_probs = draw(tensors(shape, dtype, st.floats(-50, 0) | one_of(0.0, -0.0, -1e-7, -1e4)))
    mask = draw(tensors(shape, draw(one_of(*MASKS)), one_of(0, 1)))
    steps = draw(st.integers(1, 200))
    return {
        "policy_log_probs": log_probs.where(mask != 0, draw(one_of(-1.0, NAN, -INF, INF))),
        "response_mask": mask,
        "gradient_accumulation_steps": draw(one_of(int, np.int16, torch.tensor))(steps),
        "normalize_constant": draw(
            st.floats(0.01, 100) | st.integers(1, 100) | one_of(np.float32(2.5), Fraction(1, 3))
        ),
        "rule": draw(one_of(*RULES)),
        "minibatch_tokens": draw(st.integers(24, 4096) | one_of(torch.tensor(30), np.int32(31))),
        "tap": draw(one_of(no_tap, Trace())),
    }


BAD_VALUES = one_of(-0.5, -7.0, 0.5, 0.0, -0.0, NAN, INF, -INF, -1e30, -3e38, 1e-42, -1e-320, -60000.0, 1e300)
BAD_SHAPES = one_of((), (1,), (3,), (0, 3), (3, 0), (1, 3), (3, 1), (2, 3), (3, 2), (1, 2, 3))
BAD_DTYPES = one_of(*MASKS, torch.complex64, torch.float8_e4m3fn)
ANYTHING = one_of(None, "", "2", b"1", [1], {}, object, NAN, True, 2, -1.5, 1j, torch.ones(2, 3), torch.tensor(True))
INTEGERS = st.integers(-3, 70) | st.integers() | one_of(False, 2.0, 2**53, 2**53 + 1, 2**63, -(10**400), 10**5000)
INTEGERS |= one_of(np.int8(16), np.uint64(2**63), np.bool_(True), torch.tensor(3), torch.tensor([4]), torch.tensor(2.0))
NUMBERS = st.floats() | st.integers() | one_of(0, -1, 1e-320, 1e-38, 1e-19, 1e19, 1e38, 10**400, Fraction(1, 10**400))
NUMBERS |= one_of(np.float16(0), np.float32(0), np.float32(3e38), np.float64(NAN), np.int8(3), torch.tensor(2.0))


def bad_tensors(draw, dtypes):
    tensor = draw(tensors(draw(BAD_SHAPES), draw(one_of(*FLOATS)), BAD_VALUES | one_of(0, 1, 2, -100, 255)))
    return tensor.nan_to_num(3.0).to(draw(dtypes)) if draw(st.booleans()) else tensor


@st.composite
def hostile(draw):
    """Valid arguments, some of them replaced by others that may be anything."""
    arguments = draw(valid())
    shape, dtype = arguments["response_mask"].shape, arguments["policy_log_probs"].dtype
    replace = {
        "policy_log_probs": lambda: draw(tensors(shape, dtype, BAD_VALUES)),
        "response_mask": lambda: draw(tensors(shape, draw(one_of(*FLOATS)), one_of(0, 1, -0.0, 0.5, 2, NAN, INF, 255))),
        "gradient_accumulation_steps": lambda: draw(INTEGERS),
        "normalize_constant": lambda: draw(NUMBERS),
        "rule": lambda: draw(st.text(max_size=5) | ANYTHING),
        "minibatch_tokens": lambda: draw(INTEGERS | st.none()),
        "tap": lambda: draw(one_of(None, 3, "tap")),
    }
    for name in draw(st.sets(one_of(*NAMES, "policy_log_probs", "response_mask"), min_size=1, max_size=2)):
        arguments[name] = replace[name]()
        if name != "tap" and draw(st.integers(0, 9)) == 0:
            arguments[name] = draw(ANYTHING)
        elif name in ("policy_log_probs", "response_mask") and draw(st.integers(0, 3)) == 0:
            arguments[name] = bad_tensors(draw, BAD_DTYPES)
    return arguments


def run(arguments, requires_grad=True, is_leaf=True):
    """The step on a leaf that has a gradient: its result, the error, what was added, and `.grad` before and after."""
    log_probs, added, before = arguments["policy_log_probs"], [], None
    leaf = log_probs
    if isinstance(log_probs, torch.Tensor) and log_probs.dtype in FLOATS and requires_grad:
        leaf = log_probs.clone().requires_grad_()
        leaf.register_hook(lambda gradient: added.append(gradient.clone()))
        before = torch.linspace(-1, 1, leaf.numel()).view_as(leaf).to(leaf.dtype)
        leaf.grad = before.clone()
    given = leaf if is_leaf or before is None else leaf * 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", PositiveLogProbWarning)
            result, error = sft_microbatch_train_step(**arguments | {"policy_log_probs": given}), None
    except (TypeError, ValueError) as refusal:
        result, error = None, str(refusal)
    return result, error, added, before, leaf.grad if before is not None else None


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_clear(error, added, before, after):
    assert error.startswith(NAMES)
    assert ": got " in error
    assert "; expected " in error
    assert "\n" not in error.partition("(")[0]
    assert not added
    assert before is None or torch.equal(bits(after), bits(before))


def assert_closed_form(arguments, result, added, before, after):
    log_probs, mask, rule = (arguments[name] for name in ("policy_log_probs", "response_mask", "rule"))
    constant, sum_dtype = float(arguments["normalize_constant"]), torch.promote_types(log_probs.dtype, torch.float32)
    assert torch.all((mask == 0) | (mask == 1))
    denominator = closed_form.denominator(
        rule, mask, int(arguments["gradient_accumulation_steps"]), constant, arguments["minibatch_tokens"]
    )
    if rule == "token_mean":
        denominator = int(denominator)
    loss, metadata = result
    expected = closed_form.loss(log_probs.double(), mask, denominator).item()
    limits, size = torch.finfo(sum_dtype), log_probs.double()[mask.bool()].abs().sum().item()
    quantum = limits.smallest_normal * limits.eps * max(1, constant)  # what a sum near 0 loses when divided by c
    assert math.isfinite(expected)
    assert abs(loss.item() - expected) <= 8 * limits.eps * size / denominator + quantum
    assert loss.dtype == sum_dtype
    assert metadata["num_tokens"].item() == mask.bool().sum().item()

    (gradient,), limits = added, torch.finfo(log_probs.dtype)
    torch.testing.assert_close(
        gradient.double(),
        closed_form.grad_log_probs(mask, denominator, torch.float64),
        rtol=4 * limits.eps,
        atol=limits.smallest_normal * limits.eps,  # one step of the smallest numbers
    )
    assert torch.equal(after, before + gradient)


@settings(max_examples=2000, **reproducible)
@given(valid(), st.booleans())
def test_valid_arguments_give_what_the_closed_form_gives(arguments, is_leaf):
    result, error, *gradients = run(arguments, is_leaf=is_leaf)
    assert error is None
    assert_closed_form(arguments, result, *gradients)


@settings(max_examples=3000, **reproducible)
@given(hostile(), st.integers(0, 19), st.booleans())
def test_hostile_arguments_are_refused_in_words_or_computed_correctly(arguments, requires_grad, is_leaf):
    result, error, *gradients = run(arguments, requires_grad > 0, is_leaf)
    event("refused: " + error.partition(":")[0] if error else "computed")
    if error is None:
        assert_closed_form(arguments, result, *gradients)
    else:
        assert_clear(error, *gradients)
