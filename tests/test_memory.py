"""Bytes held for backward: exact, repeatable, a straight line in the microbatch, and flat in their number."""

import pytest
import torch

from sft_edu import TinyLM, accumulate, get_response_log_probs, saved_bytes, sft_microbatch_train_step, split_minibatch
from sft_edu.memory import SavedForBackward, graph_nodes, retained_bytes
from sft_edu.ragged import ragged_minibatch

MODEL, BATCH = TinyLM(), ragged_minibatch(16, imbalance=0.0)  # 55 tokens, 24 of them response


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small gain nothing from threads, and on a busy machine those wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first(num_sequences):
    return split_minibatch(BATCH, sizes=[num_sequences, 16 - num_sequences])[0] if num_sequences < 16 else BATCH


def peak(microbatches):
    return saved_bytes(lambda: accumulate(MODEL, microbatches), MODEL, BATCH)


def log_probs():
    return get_response_log_probs(MODEL, BATCH["input_ids"], BATCH["labels"])["log_probs"]


def total():
    return -log_probs()[BATCH["response_mask"]].sum()


# --- The microbatch decides ---


def test_the_peak_is_a_straight_line_in_the_microbatch_size():
    """Measured: 539,715 B per sequence of 55 tokens and 444 B besides, on the model with its default sizes."""
    peaks = [peak([first(size)]) for size in range(1, 17)]
    per_sequence = peaks[1] - peaks[0]
    assert peaks == [peaks[0] + per_sequence * more for more in range(16)]
    assert 0 <= peaks[0] - per_sequence < 1000 < per_sequence


def test_the_peak_is_flat_in_the_number_of_microbatches():
    assert len({peak([first(2)] * steps) for steps in (1, 2, 3, 5, 8)}) == 1


@pytest.mark.parametrize("steps", [2, 4, 8, 16])
def test_g_microbatches_need_one_gth_of_the_full_batch(steps):
    assert peak([BATCH]) / peak(split_minibatch(BATCH, steps)) == pytest.approx(steps, rel=0.01)


def test_graphs_that_are_kept_add_up():
    """One backward at the end, over the sum of all losses, needs as much as the full batch."""

    def one_backward():
        parts = [get_response_log_probs(MODEL, one["input_ids"], one["labels"])["log_probs"] for one in microbatches]
        torch.stack([part.sum() for part in parts]).sum().backward()

    microbatches = split_minibatch(BATCH, 8)
    assert saved_bytes(one_backward, MODEL, BATCH) == pytest.approx(peak([BATCH]), rel=0.01)
    MODEL.zero_grad()


def test_every_measurement_is_the_same():
    assert len({peak([first(3)]) for _ in range(5)}) == 1


# --- What counts ---


def test_a_storage_counts_once_and_whole():
    x = torch.ones(10, dtype=torch.float64, requires_grad=True)
    with SavedForBackward(x) as saved:
        y = x * 2.0
        assert saved.now == 0  # the factor is a number: nothing to keep
        z = (y[:5] * y[5:]).sum() + (y * y).sum()
        assert saved.now == 80  # four views of y
        z.backward()
    assert (saved.now, saved.peak) == (0, 80)


def test_given_models_tensors_and_batches_do_not_count():
    layer, batch = torch.nn.Linear(4, 4, dtype=torch.float64), {"x": torch.ones(3, 4, dtype=torch.float64)}

    def forward():
        return layer(batch["x"])

    assert saved_bytes(forward, layer, batch) == 0
    assert saved_bytes(forward, layer, batch["x"][1:]) == 0  # a view stands for its storage
    assert saved_bytes(forward, layer) == 3 * 4 * 8
    with pytest.raises(TypeError, match="given: got list; expected a model, a tensor or a dict"):
        saved_bytes(forward, [layer])


def test_a_second_use_starts_from_0_and_the_first_no_longer_counts():
    x, saved = torch.ones(10, requires_grad=True), SavedForBackward()
    with saved:
        kept = x.exp()
    assert (saved.now, saved.peak) == (40, 40)
    with saved:
        assert (saved.now, saved.peak) == (0, 0)
        other = x[:5].exp()
        del kept
    assert (saved.now, saved.peak) == (20, 20)
    del other
    assert (saved.now, saved.peak) == (0, 20)


def test_nothing_is_counted_or_hooked_outside_the_block_also_when_it_raises():
    x, saved = torch.ones(10, requires_grad=True), SavedForBackward()

    def fails():
        with saved:
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fails()
    kept = x.exp()
    assert (saved.now, saved.peak) == (0, 0)
    assert kept.requires_grad


def test_measuring_changes_no_gradient_to_the_bit():
    gradients = []
    plain = accumulate(MODEL, [first(3)]).gradient
    saved_bytes(lambda: gradients.append(accumulate(MODEL, [first(3)]).gradient), MODEL, BATCH)
    assert torch.equal(gradients[0], plain)


def test_a_graph_that_never_ran_backward_is_freed_all_the_same():
    """exp saves its own result: kept undetached, that would hold the node that holds it, for good."""
    with SavedForBackward() as saved:
        result = torch.ones(10, requires_grad=True).exp()
        assert saved.now == 40
        del result
        assert saved.now == 0


# --- What a kept loss retains ---


def test_a_returned_loss_retains_nothing():
    def step():
        return sft_microbatch_train_step(log_probs(), BATCH["response_mask"], 2)

    assert saved_bytes(step, MODEL, BATCH) > 8_000_000
    assert retained_bytes(step, MODEL, BATCH) == 0
    loss, metadata = step()
    assert [graph_nodes(value) for value in (loss, *metadata.values())] == [0] * 6
    MODEL.zero_grad()


def test_a_loss_that_was_not_detached_retains_graph_nodes_and_no_bytes_after_its_backward():
    """Measured: 97 nodes."""

    def after_backward(**options):
        loss = total()
        loss.backward(**options)
        return loss

    whole_graph = saved_bytes(total, MODEL, BATCH)
    assert retained_bytes(after_backward, MODEL, BATCH) == 0
    assert 50 < graph_nodes(after_backward()) < 200
    assert retained_bytes(lambda: after_backward(retain_graph=True), MODEL, BATCH) == whole_graph
    MODEL.zero_grad()


def test_a_value_whose_branch_never_ran_backward_retains_a_whole_graph_at_every_step():
    """Measured: 8.6 MB a step, all of what backward would have needed."""
    whole_graph = saved_bytes(total, MODEL, BATCH)
    assert retained_bytes(total, MODEL, BATCH) == whole_graph > 8_000_000
    assert retained_bytes(lambda: total().detach(), MODEL, BATCH) == 0
    for steps in (1, 2, 3):
        kept = retained_bytes(lambda steps=steps: [total() for _ in range(steps)], MODEL, BATCH)
        assert kept == steps * whole_graph
