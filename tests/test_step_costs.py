"""How a minibatch's cost grows. Counts are exact; of seconds only a wide verdict is asked."""

import pytest
import torch

from sft_edu.one_thread import one_thread
from sft_edu.ranks.step_costs import Size, growth, seconds_per_token, step_cost


def costs(name, values):
    return [step_cost(Size(**{name: value})) for value in values]


def test_cost_per_token_and_memory_are_flat_in_the_number_of_microbatches():
    one, *others = costs("gradient_accumulation_steps", (1, 2, 5))
    assert {cost.operations_per_token for cost in others} == {one.operations_per_token}
    assert {cost.held for cost in others} == {one.held}


def test_memory_is_a_straight_line_in_the_microbatch_size():
    held = [cost.held for cost in costs("microbatch_size", (1, 2, 3, 6))]
    slopes = {held[1] - held[0], held[2] - held[1], (held[3] - held[2]) // 3}
    assert max(slopes) == min(slopes)
    assert growth((1, 2, 3, 6), held) == pytest.approx(1, abs=0.01)


def test_memory_is_a_straight_line_in_the_length_too():
    lengths = (32, 64, 128)
    assert growth(lengths, [cost.held for cost in costs("length", lengths)]) == pytest.approx(1, abs=0.02)


def test_operations_are_those_of_the_matrix_products():
    """Forward 2 for each weight and token, backward twice that; attention 2·2·T·d for each token and layer."""
    size = Size(microbatch_size=3, length=16, vocab_size=100, gradient_accumulation_steps=2)
    d, layers = 32, 2
    weights = layers * (3 * d * d + d * d + 8 * d * d) + d * size.vocab_size
    forward = 2 * weights + layers * 2 * 2 * size.length * d
    assert step_cost(size).operations == pytest.approx(3 * forward * size.tokens, rel=0.02)


def test_operations_per_token_grow_with_length_and_vocabulary():
    for name, values in (("length", (32, 128)), ("vocab_size", (256, 1024))):
        short, long = costs(name, values)
        assert short.operations_per_token < long.operations_per_token


def test_time_per_token_does_not_follow_the_number_of_microbatches():
    few, many = seconds_per_token([Size(gradient_accumulation_steps=steps) for steps in (1, 8)])
    assert 1 / 4 < many / few < 4


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2])
def test_growth_finds_the_exponent_of_a_power_law(exponent):
    assert growth((1, 3, 7), [5 * x**exponent for x in (1, 3, 7)]) == pytest.approx(exponent, abs=1e-12)


@pytest.mark.parametrize(("xs", "ys"), [((1,), (1,)), ((1, 2), (0, 1)), ((1, 2), (1,)), ((2, 2), (1, 3)), ((), ())])
def test_growth_refuses_what_has_no_exponent(xs, ys):
    with pytest.raises(ValueError, match="got"):
        growth(xs, ys)


def test_the_number_of_threads_comes_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
