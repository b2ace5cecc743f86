"""The three loops of the course notes: each trains as `Training` does, and where the notes go wrong they do not."""

import copy
import dataclasses
import inspect

import pytest
import torch
from test_train import encoded, tiny, weights

from sft_edu.data.encode import collate
from sft_edu.training.patterns import train_basic, train_with_clipping, train_with_logging
from sft_edu.training.train import Record, Training
from sft_edu.training.train_config import TrainConfig, make_optimizer

# AdamW would blow rounding up where a gradient is almost 0.
CONFIG = TrainConfig(
    microbatch_size=2,
    gradient_accumulation_steps=3,
    optimizer="sgd",
    learning_rate=0.1,
    warmup_steps=0,
    final_share=1.0,
    max_norm=0.5,
)
PATTERNS = [train_basic, train_with_logging, train_with_clipping]


def minibatches(training: Training) -> list[list[dict[str, torch.Tensor]]]:
    """All of an epoch, in the order in which `training` takes them."""
    found = []
    while not training.finished:
        found.append([collate(microbatch, training.pad_token_id) for microbatch in training.minibatch()])
        training.step += 1
    training.step = 0
    return found


def trained(pattern, **config) -> tuple[object, list[Record]]:
    """What a pattern returns, and the records of `Training`, which gets to the same weights."""
    config = dataclasses.replace(CONFIG, **config)
    training = Training(tiny(torch.float64), encoded(20), config)  # 6 + 6 + 6 + 2 sequences
    batches, model = minibatches(training), tiny(torch.float64)
    options = {"max_norm": config.max_norm} if pattern is train_with_clipping else {}
    returned = pattern(model, batches, make_optimizer(model, config), **options)
    records = list(training)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert torch.allclose(weights(model), weights(training.model), rtol=0, atol=1e-12)
    return returned, records


def test_the_basic_one_trains_like_the_loop_without_clipping():
    returned, _ = trained(train_basic, max_norm=float("inf"))
    assert returned is None


def test_the_logging_one_keeps_loss_per_token_and_tokens():
    logs, records = trained(train_with_logging, max_norm=float("inf"))
    assert [log["num_tokens"] for log in logs] == [record.num_tokens for record in records]
    assert [log["nll"] for log in logs] == pytest.approx([record.nll for record in records], rel=1e-10)


def test_the_clipping_one_clips_once_for_each_step():
    norms, records = trained(train_with_clipping)
    assert norms == pytest.approx([record.grad_norm for record in records], rel=1e-10)
    assert min(norms) > CONFIG.max_norm  # or else nothing was clipped


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_split_does_not_matter(pattern):
    training = Training(tiny(torch.float64), encoded(20), CONFIG)
    examples = [[e for microbatch in [training.minibatch()] for part in microbatch for e in part]]
    ends = []
    for size in (1, 2, 6):
        model = tiny(torch.float64)
        parts = [[collate(one[i : i + size], 0) for i in range(0, len(one), size)] for one in examples]
        pattern(model, parts, torch.optim.SGD(model.parameters(), 0.1))
        ends.append(weights(model))
    assert not torch.equal(ends[0], weights(tiny(torch.float64)))
    assert all(torch.allclose(end, ends[0], rtol=0, atol=1e-12) for end in ends)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_microbatch_costs_one_forward_pass_and_no_gradient_is_left(pattern):
    model, calls = tiny(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    batches = minibatches(Training(copy.deepcopy(model), encoded(20), CONFIG))
    pattern(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    assert len(calls) == sum(map(len, batches)) == 10
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_they_are_short_enough_to_be_read(pattern):
    assert len(inspect.getsource(pattern).splitlines()) <= 32
    assert "get_response_log_probs" in inspect.getsource(pattern)
