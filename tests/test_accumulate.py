"""Many microbatches are the full batch: under which rule, how exactly, and what is left untouched.

Equality is decided in float64: 1e-14, for gradients relative in the L2 norm. In float32 it is 2e-6.
"""

import itertools
import random

import pytest
import torch

from sft_edu import RULES, ByteTokenizer, TinyLM, accumulate, compare, full_batch_gradient, split_minibatch
from sft_edu.ragged import ragged_minibatch

EXACT = {torch.float64: 1e-14, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small gain nothing from threads, and on a busy machine those wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(dtype=torch.float64):
    return TinyLM(d_model=16, num_layers=1, num_heads=2).to(dtype)


def compositions(total):
    """Every way to cut a row of `total` sequences into microbatches: 2**(total - 1)."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        edges = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), total]
        yield [end - start for start, end in itertools.pairwise(edges)]


def error(model, microbatches, reference, **options):
    return compare(accumulate(model, microbatches, **options).gradient, reference).relative_error


def grads(model):
    return [parameter.grad for parameter in model.parameters()]


def masked(batch):
    return batch | {"response_mask": torch.zeros_like(batch["response_mask"])}


# --- The law ---


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_token_mean_is_the_full_batch_for_all_128_splits_of_eight_sequences_and_the_mean_of_means_is_not(dtype):
    """Measured: 2.7e-16 in float64 and 1.4e-7 in float32 at worst; the wrong rule is off by 9 % to 113 %."""
    model, batch = tiny_model(dtype), ragged_minibatch(8, imbalance=1.0)
    full_batch, splits = full_batch_gradient(model, batch), list(compositions(8))
    assert (len(splits), splits[0]) == (128, [8])
    for sizes in splits:
        microbatches = split_minibatch(batch, sizes=sizes)
        assert error(model, microbatches, full_batch) <= EXACT[dtype]
        wrong = error(model, microbatches, full_batch, rule="microbatch_token_mean")
        assert wrong <= EXACT[dtype] if sizes == [8] else wrong >= 1e-2


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 11, 13])
def test_the_law_holds_for_odd_steps_and_for_steps_that_do_not_divide_the_minibatch(steps):
    model, batch = tiny_model(), ragged_minibatch(13, imbalance=1.0, seed=1)
    full_batch, microbatches = full_batch_gradient(model, batch), split_minibatch(batch, steps)
    assert error(model, microbatches, full_batch) <= 1e-14
    assert steps == 1 or error(model, microbatches, full_batch, rule="microbatch_token_mean") >= 1e-2


def test_in_bfloat16_only_a_gross_mistake_can_be_seen():
    model, batch = tiny_model(torch.bfloat16), ragged_minibatch(8, imbalance=1.0)
    full_batch, microbatches = full_batch_gradient(model, batch), split_minibatch(batch, 4)
    assert error(model, microbatches, full_batch) <= 2e-2
    assert error(model, microbatches, full_batch, rule="microbatch_token_mean") >= 0.1


def test_where_all_microbatches_have_as_many_tokens_the_mean_of_means_is_right_too():
    model, batch = tiny_model(), ragged_minibatch(9, imbalance=0.0)
    full_batch, microbatches = full_batch_gradient(model, batch), split_minibatch(batch, 3)
    assert error(model, microbatches, full_batch, rule="microbatch_token_mean") <= 1e-14
    assert error(model, split_minibatch(batch, 2), full_batch, rule="microbatch_token_mean") >= 1e-2


def test_sequence_mean_is_the_full_batch_while_all_microbatches_are_equally_large():
    model, batch = tiny_model(), ragged_minibatch(12, imbalance=1.0)
    full_batch = full_batch_gradient(model, batch, objective="sequence_mean")
    assert error(model, split_minibatch(batch, 4), full_batch, rule="sequence_mean") <= 1e-14
    assert error(model, split_minibatch(batch, 5), full_batch, rule="sequence_mean") >= 1e-2
    assert error(model, split_minibatch(batch, 4), full_batch) >= 1e-2


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
def test_notes_is_one_over_g_times_the_mean_of_the_microbatch_sums(steps):
    model, batch = tiny_model(), ragged_minibatch(12, imbalance=1.0)
    microbatches = split_minibatch(batch, steps)
    mean_of_sums = sum(full_batch_gradient(model, one, objective="sum") for one in microbatches) / steps
    assert error(model, microbatches, mean_of_sums / steps, rule="notes") <= 1e-14
    assert error(model, microbatches, mean_of_sums / steps / 2.5, rule="notes", normalize_constant=2.5) <= 1e-14
    assert error(model, microbatches, mean_of_sums, rule="notes") == pytest.approx(1 - 1 / steps)


def test_a_microbatch_without_response_tokens_contributes_exactly_0():
    model, batch = tiny_model(), ragged_minibatch(4, imbalance=1.0)
    microbatches = split_minibatch(batch, 2)
    result = accumulate(model, [microbatches[0], masked(batch), microbatches[1]], keep_running=True)
    assert result.losses[1] == 0
    assert torch.equal(result.running[1], result.running[0])
    assert torch.equal(result.gradient, accumulate(model, microbatches).gradient)
    for rule in RULES:
        nothing = accumulate(model, [masked(batch)] * 3, rule=rule)
        assert (nothing.gradient.abs().max(), nothing.logged_loss) == (0, 0)
    assert full_batch_gradient(model, masked(batch)).abs().max() == 0


# --- What comes back ---


def test_the_result_holds_losses_tokens_and_running_gradients():
    model, batch = tiny_model(), ragged_minibatch(5, imbalance=1.0)
    microbatches, seen = split_minibatch(batch, 3), []
    result = accumulate(
        model,
        microbatches,
        keep_running=True,
        on_microbatch=lambda index, loss, metadata: seen.append((index, loss.item(), metadata["num_tokens"].item())),
    )
    assert result.num_tokens.tolist() == [int(one["response_mask"].sum()) for one in microbatches]
    assert seen == list(zip(range(3), result.losses.tolist(), result.num_tokens.tolist(), strict=True))
    assert torch.equal(result.running[-1], result.gradient)
    sums = [full_batch_gradient(model, one, objective="sum") for one in microbatches]
    for index, running in enumerate(result.running):
        assert compare(running, sum(sums[: index + 1]) / result.num_tokens.sum()).relative_error <= 1e-14
    assert accumulate(model, microbatches).running == ()


def test_the_logged_loss_is_the_loss_per_token_under_token_mean_and_depends_on_g_under_notes():
    model, batch = tiny_model(), ragged_minibatch(12, imbalance=1.0)
    token_mean, notes = (
        [accumulate(model, split_minibatch(batch, steps), rule=rule).logged_loss.item() for steps in (1, 3, 4)]
        for rule in ("token_mean", "notes")
    )
    logits = model(batch["input_ids"])[batch["response_mask"]]
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][batch["response_mask"]]).item()
    assert token_mean == pytest.approx([expected] * 3, rel=1e-14)
    assert notes == pytest.approx([notes[0], notes[0] / 9, notes[0] / 16], rel=1e-14)


def test_the_gradient_has_the_models_dtype_and_the_order_of_its_parameters_with_0_for_a_frozen_one():
    model, batch = tiny_model(torch.float32), ragged_minibatch(3, imbalance=0.5)
    frozen = model.head.weight.requires_grad_(False)
    for gradient in (accumulate(model, [batch]).gradient, full_batch_gradient(model, batch)):
        parts = gradient.split([parameter.numel() for parameter in model.parameters()])
        assert gradient.dtype == torch.float32
        for parameter, part in zip(model.parameters(), parts, strict=True):
            assert bool(part.any()) == (parameter is not frozen)


def test_a_count_of_more_ranks_divides_by_all_their_tokens():
    model, batch = tiny_model(), ragged_minibatch(6, imbalance=1.0)
    ranks = split_minibatch(batch, sizes=[2, 4])
    total = int(batch["response_mask"].sum())
    gradients = [accumulate(model, split_minibatch(rank, 2), minibatch_tokens=total).gradient for rank in ranks]
    assert compare(sum(gradients), full_batch_gradient(model, batch)).relative_error <= 1e-14


def test_an_accumulation_prints_no_gradient():
    result = accumulate(tiny_model(), [ragged_minibatch(2, 0.0)])
    assert repr(result).startswith("Accumulation(losses=tensor([")
    assert "gradient" not in repr(result)


# --- What is left alone ---


def with_gradients(model):
    """Some gradients of the user's, one of them missing and one with a NaN."""
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * index) if index else None
    model.head.weight.grad[0, 0] = torch.nan
    return model


def raises(*_):
    raise RuntimeError("midway")


@pytest.mark.parametrize("on_microbatch", [None, raises])
def test_the_gradients_of_the_user_are_the_same_tensors_afterwards_also_when_something_raises(on_microbatch):
    model, batch = with_gradients(tiny_model()), ragged_minibatch(4, imbalance=1.0)
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    before, copies = grads(model), [None if grad is None else grad.clone() for grad in grads(model)]
    if on_microbatch is None:
        accumulate(model, split_minibatch(batch, 2))
        full_batch_gradient(model, batch)
    else:
        with pytest.raises(RuntimeError, match="midway"):
            accumulate(model, split_minibatch(batch, 2), on_microbatch=on_microbatch)
    for old, copy, new in zip(before, copies, grads(model), strict=True):
        assert new is old
        assert new is None or torch.equal(new.view(torch.int64), copy.view(torch.int64))
    assert all(torch.equal(*pair) for pair in zip(parameters, model.parameters(), strict=True))


def test_gradients_of_the_user_do_not_enter_the_result():
    batch = ragged_minibatch(4, imbalance=1.0)
    results = [accumulate(model, [batch]).gradient for model in (tiny_model(), with_gradients(tiny_model()))]
    assert torch.equal(*results)


def test_the_callback_sees_what_has_accumulated_so_far():
    model, norms = tiny_model(), []
    result = accumulate(
        model,
        split_minibatch(ragged_minibatch(4, imbalance=1.0), 4),
        keep_running=True,
        on_microbatch=lambda *_: norms.append(model.head.weight.grad.norm()),
    )
    size = model.head.weight.numel()
    assert norms == [running[-size:].view(model.head.weight.shape).norm() for running in result.running]


def test_gradients_are_computed_inside_no_grad_too():
    model, batch = tiny_model(), ragged_minibatch(2, imbalance=0.0)
    with torch.no_grad():
        assert error(model, [batch], full_batch_gradient(model, batch)) <= 1e-14
        assert not torch.is_grad_enabled()


# --- Splitting ---


@pytest.mark.parametrize(
    ("num_sequences", "steps", "sizes"), [(8, 4, [2, 2, 2, 2]), (8, 3, [3, 3, 2]), (7, 5, [2, 2, 1, 1, 1]), (1, 1, [1])]
)
def test_a_minibatch_is_split_in_order_and_as_equally_as_possible(num_sequences, steps, sizes):
    batch = ragged_minibatch(num_sequences, imbalance=1.0)
    microbatches = split_minibatch(batch, steps)
    assert [len(one["labels"]) for one in microbatches] == sizes
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([one[name] for one in microbatches]), tensor)
        assert microbatches[0][name].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


BATCH = ragged_minibatch(4, imbalance=0.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: split_minibatch(BATCH, 5), "gradient_accumulation_steps: got 5; expected at most 4, the sequences"),
        (lambda: split_minibatch(BATCH, 0), "gradient_accumulation_steps: got 0; expected"),
        (lambda: split_minibatch(BATCH, True), "gradient_accumulation_steps: got True"),
        (lambda: split_minibatch(BATCH), "got both or neither; expected one of them"),
        (lambda: split_minibatch(BATCH, 2, sizes=[2, 2]), "got both or neither; expected one of them"),
        (lambda: split_minibatch(BATCH, sizes=[1, 2]), r"sizes: got \[1, 2\]; expected .* add up to 4"),
        (lambda: split_minibatch(BATCH, sizes=[4, 0]), "sizes: got .* of at least 1"),
        (lambda: split_minibatch(BATCH, sizes=[5, -1]), "sizes: got .* of at least 1"),
        (lambda: split_minibatch([1, 2], 2), "batch: got list; expected a dict"),
        (lambda: split_minibatch({"labels": torch.ones(2, 2)}, 2), "batch: got dict; expected .* response_mask"),
        (lambda: split_minibatch(BATCH | {"labels": torch.ones(3, 2)}, 2), "batch: got .* one first dimension"),
        (lambda: accumulate(tiny_model(), []), "microbatches: got none; expected"),
        (lambda: accumulate(tiny_model(), BATCH), "microbatches: got a single batch; expected a list"),
        (lambda: accumulate(tiny_model(), [BATCH, {}]), "batch: got dict; expected"),
        (lambda: accumulate(tiny_model(), [BATCH], rule="mean"), "rule: got 'mean'"),
        (lambda: accumulate(tiny_model(), [BATCH], minibatch_tokens=3), "minibatch_tokens: got"),
        (lambda: accumulate(lambda ids: ids, [BATCH]), "model: got function; expected a torch.nn.Module"),
        (lambda: accumulate(tiny_model().requires_grad_(False), [BATCH]), "model: got no parameter"),
        (lambda: full_batch_gradient(tiny_model(), BATCH, objective="mean"), "objective: got 'mean'; expected one of"),
        (lambda: compare(torch.ones(2), torch.ones(3)), r"gradient: got shape \[2\]; expected \[3\]"),
        (lambda: ragged_minibatch(0, 0.5), "num_sequences: got 0"),
        (lambda: ragged_minibatch(True, 0.5), "num_sequences: got True"),
        (lambda: ragged_minibatch(2, 1.5), "imbalance: got 1.5"),
        (lambda: ragged_minibatch(2, float("nan")), "imbalance: got nan"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()


# --- Comparing ---


def test_a_comparison_is_length_direction_and_distance():
    reference = torch.tensor([3.0, 4.0])
    one = compare(2 * reference, reference)
    assert (one.ratio, one.cosine, one.relative_error) == pytest.approx((2, 1, 1))
    one = compare(torch.tensor([4.0, -3.0]), reference)
    assert (one.ratio, one.cosine, one.relative_error) == pytest.approx((1, 0, 2**0.5))
    assert compare(-reference, reference).cosine == -1


def test_a_reference_of_0_has_a_meaning():
    zero, one = torch.zeros(3), torch.ones(3)
    assert vars(compare(zero, zero)) == {"ratio": 1, "cosine": 1, "relative_error": 0}
    assert vars(compare(one, zero)) == {"ratio": torch.inf, "cosine": 0, "relative_error": torch.inf}
    assert vars(compare(zero, one)) == {"ratio": 0, "cosine": 0, "relative_error": 1}
    assert all(value != value for value in vars(compare(one * torch.nan, one)).values())


# --- The ragged minibatch ---


def lengths(num_sequences, imbalance, **options):
    return ragged_minibatch(num_sequences, imbalance, **options)["response_mask"].sum(1).tolist()


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 8, 13, 32])
def test_the_imbalance_moves_tokens_between_responses_and_not_their_total(num_sequences):
    assert set(lengths(num_sequences, 0.0)) == {24}
    for imbalance in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = lengths(num_sequences, imbalance)
        assert sum(found) == 24 * num_sequences
        assert num_sequences == 1 or max(found) / min(found) == pytest.approx(16**imbalance, rel=0.15)


def test_the_texts_are_words_and_their_capitals():
    tokenizer, batch = ByteTokenizer(), ragged_minibatch(8, imbalance=1.0)
    for ids, labels, mask in zip(*batch.values(), strict=True):
        output = tokenizer.decode(labels[mask])
        assert all(3 <= len(word) <= 6 and word.isupper() for word in output.split(" "))
        assert tokenizer.decode(ids[: int(mask.nonzero()[0]) + 1]) == f"upper: {output.lower()}\n"


def test_the_seed_alone_decides_and_no_global_generator_is_touched():
    before = random.getstate(), torch.get_rng_state()
    first, again, other = (ragged_minibatch(8, 1.0, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], other["labels"])
    assert (random.getstate(), True) == (before[0], torch.equal(torch.get_rng_state(), before[1]))
    assert lengths(8, 1.0) == [20, 6, 29, 9, 4, 14, 66, 44]  # the same on every machine
