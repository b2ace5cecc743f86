"""The tiny model: repeatable, causal, bounded, and able to learn."""

import random

import numpy as np
import pytest
import torch

from sft_edu import ByteTokenizer, TinyLM, default_device, get_response_log_probs, sft_microbatch_train_step
from sft_edu import tokenize_prompt_and_output as tokenize

SMALL = {"vocab_size": 11, "d_model": 16, "num_heads": 2, "context_length": 12}


def weights(seed):
    return torch.cat([parameter.flatten() for parameter in TinyLM(**SMALL, seed=seed).parameters()])


def test_the_seed_decides_every_weight():
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.isfinite(weights(3)).all()


def test_the_global_random_numbers_are_neither_drawn_nor_reset():
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    TinyLM(**SMALL)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    torch.manual_seed(6)
    assert torch.equal(weights(0), weights(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_changes_no_weight(dtype):
    before = weights(3)
    torch.set_default_dtype(dtype)
    try:
        after = weights(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.dtype == torch.float32
    assert torch.equal(after, before)


@pytest.mark.parametrize("changed", range(12))
def test_a_token_changes_nothing_before_it_and_something_at_it(changed):
    model = TinyLM(**SMALL)
    ids = torch.arange(12).remainder(11).repeat(2, 1)
    logits = model(ids)
    ids[:, changed] = (ids[:, changed] + 1) % 11
    other = model(ids)
    assert logits.shape == (2, 12, 11)
    assert torch.equal(logits[:, :changed], other[:, :changed])
    assert (logits[:, changed:] != other[:, changed:]).any(-1).all()


def test_it_reads_as_far_as_its_context_and_says_where_that_ends():
    model = TinyLM(**SMALL)
    assert model(torch.zeros(1, 12, dtype=torch.int64)).shape == (1, 12, 11)
    with pytest.raises(ValueError, match=r"^input_ids: got 13 tokens; expected at most 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


def test_the_heads_divide_the_width():
    with pytest.raises(ValueError, match=r"^num_heads: got 3; expected a divisor of d_model, 16"):
        TinyLM(**SMALL | {"num_heads": 3})


def test_it_has_the_size_that_it_says():
    assert sum(parameter.numel() for parameter in TinyLM().parameters()) == pytest.approx(0.14e6, rel=0.1)
    with torch.no_grad():
        logits = TinyLM()(torch.arange(256).unsqueeze(0))
    assert 0.5 < logits.std() < 2


def test_one_step_of_sgd_lowers_the_loss():
    tokenizer, model = ByteTokenizer(), TinyLM()
    batch = tokenize(["up: cat\n", "up: dog\n"], ["CAT", "DOG"], tokenizer, append_eos=True)
    losses = []
    for _ in range(2):
        log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
        loss, _ = sft_microbatch_train_step(log_probs, batch["response_mask"], 1, rule="sequence_mean")
        losses.append(loss.item())
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
        model.zero_grad()
    assert losses[1] < 0.95 * losses[0]


def test_the_default_device_can_hold_a_tensor():
    assert torch.ones(1, device=default_device()).sum().item() == 1
