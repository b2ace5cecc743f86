"""The loop: the same weights for every G, an incomplete window, clipping, and a stop anywhere."""

import dataclasses
import math
import re
from itertools import chain, islice, pairwise

import pytest
import torch

from sft_edu.accumulate import compare, full_batch_gradient
from sft_edu.data.encode import Encoded, collate
from sft_edu.data.tasks import make_examples
from sft_edu.model import TinyLM
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.train import OutOfMemory, Training
from sft_edu.training.train_config import TrainConfig, learning_rate_at

TOKENIZER = ByteTokenizer()


def encoded(count: int, seed: int = 0) -> list[Encoded]:
    sequences = []
    for prompt, response in make_examples(count, seed=seed):
        start = TOKENIZER.encode(prompt, add_special_tokens=False)
        end = [*TOKENIZER.encode(response, add_special_tokens=False), TOKENIZER.eos_token_id]
        sequences.append(Encoded((*start, *end), (False,) * len(start) + (True,) * len(end)))
    return sequences


def tiny(dtype: torch.dtype = torch.float32) -> TinyLM:
    return TinyLM(d_model=32, num_layers=1, num_heads=2, context_length=32).to(dtype)


def training(examples, model=None, **config) -> Training:
    return Training(model or tiny(), examples, TrainConfig(**config), pad_token_id=TOKENIZER.pad_token_id)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def after(rule: str, num_microbatches: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights after 50 AdamW steps on minibatches of 8 sequences, each split into G microbatches."""
    run = training(encoded(400), tiny(dtype), rule=rule, microbatch_size=8, gradient_accumulation_steps=1, **SLOW)
    minibatch = run.minibatch
    sizes = [8 // num_microbatches + (i < 8 % num_microbatches) for i in range(num_microbatches)]

    def resplit() -> list[list[Encoded]]:
        sequences = iter(minibatch()[0])
        return [list(islice(sequences, size)) for size in sizes]

    run.minibatch = resplit
    assert len(list(run)) == 50
    return weights(run.model)


SLOW = {"learning_rate": 3e-4, "warmup_steps": 5}


def test_token_mean_gives_the_same_weights_for_every_split_and_the_mean_of_means_does_not():
    start = weights(tiny())
    for dtype, weights_agree, changes_agree in ((torch.float32, 2e-5, 1e-2), (torch.float64, 1e-13, 1e-10)):
        reference = after("token_mean", 1, dtype)
        for steps in range(2, 9):
            ours = after("token_mean", steps, dtype)
            assert compare(ours, reference).relative_error <= weights_agree, (dtype, steps)
            assert compare(ours - start, reference - start).relative_error <= changes_agree, (dtype, steps)
            theirs = after("microbatch_token_mean", steps, dtype)
            assert compare(theirs - start, reference - start).relative_error >= 2e-2, (dtype, steps)


def test_an_incomplete_window_is_stepped_with_the_tokens_it_has():
    examples = encoded(11)
    model = tiny(torch.float64)
    run = training(examples, model, microbatch_size=3, gradient_accumulation_steps=2, optimizer="sgd", max_norm=1e9)
    assert run.steps_per_epoch == run.num_steps == 2
    next(iter(run))
    last = [example for microbatch in run.minibatch() for example in microbatch]
    assert len(last) == 5
    expected = full_batch_gradient(model, collate(last, TOKENIZER.pad_token_id))
    before = weights(model)
    (record,) = list(run)
    rate = record.learning_rate
    moved = (before - weights(model)) / rate - 0.01 * before  # weight decay is part of SGD's step
    assert compare(moved, expected).relative_error < 1e-9
    assert record.num_tokens == sum(sum(example.is_response[1:]) for example in last)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_example_is_seen_once_in_each_epoch():
    run = training(encoded(10), microbatch_size=2, gradient_accumulation_steps=2, num_epochs=2)
    seen = []
    while not run.finished:
        seen.append([example for microbatch in run.minibatch() for example in microbatch])
        while run.run_microbatch() is None:
            pass
    epochs = [list(chain(*seen[:3])), list(chain(*seen[3:]))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(run.examples)
    assert epochs[0] != epochs[1]


def test_a_minibatch_is_cut_and_counted_once():
    run, calls = training(encoded(12), microbatch_size=2, gradient_accumulation_steps=3), []
    minibatch = run.minibatch
    run.minibatch = lambda: calls.append(run.step) or minibatch()
    list(run)
    assert calls == [0, 1]


def test_a_run_in_one_process_stops_after_any_microbatch():
    run = training(encoded(12), microbatch_size=2, gradient_accumulation_steps=3)
    run.run_microbatch()
    assert (run.microbatch, run.agree_to_stop(lambda: True), run.agree_to_stop(lambda: False)) == (1, True, False)


def test_a_record_tells_what_happened():
    model = tiny(torch.float64)
    run = training(encoded(12), model, microbatch_size=3, gradient_accumulation_steps=4, max_norm=0.5)
    microbatches = [collate(part, TOKENIZER.pad_token_id) for part in run.minibatch()]
    whole = collate([e for part in run.minibatch() for e in part], TOKENIZER.pad_token_id)
    log_probs = model(whole["input_ids"]).log_softmax(-1)
    chosen = log_probs.gather(-1, whole["labels"].unsqueeze(-1)).squeeze(-1)[whole["response_mask"]]
    entropy = -(log_probs.exp() * log_probs).sum(-1)[whole["response_mask"]].mean()
    norm = full_batch_gradient(model, whole).norm()
    (record,) = list(run)
    assert (record.step, record.epoch, len(microbatches)) == (1, 1.0, 4)
    assert record.num_tokens == len(chosen)
    assert record.nll == pytest.approx(-chosen.mean().item(), rel=1e-12)
    assert record.notes_loss == pytest.approx(-chosen.sum().item() / 4**2 / 4, rel=1e-12)
    assert record.entropy == pytest.approx(entropy.item(), rel=1e-12)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-9)
    assert record.clipped_norm == 0.5 < record.grad_norm


def test_the_learning_rate_climbs_and_falls():
    config = TrainConfig(learning_rate=2.0, warmup_steps=4, final_share=0.1)
    rates = [learning_rate_at(step, 104, config) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[54] == pytest.approx(1.1)
    assert rates[103] > rates[104] == pytest.approx(0.2)  # the step after the last would have it
    assert all(later <= sooner for sooner, later in pairwise(rates[4:]))


@pytest.mark.parametrize("microbatches", [1, 3, 6])
def test_it_goes_on_bit_for_bit(microbatches: int):
    config = {"microbatch_size": 2, "gradient_accumulation_steps": 4, "warmup_steps": 2}
    straight, stopped, resumed = (training(encoded(32), **config) for _ in range(3))
    expected = list(straight)
    records = [stopped.run_microbatch() for _ in range(microbatches)]
    state = stopped.state_dict()
    resumed.load_state_dict(state)
    assert resumed.microbatch == microbatches % 4
    assert [r for r in records if r] + list(resumed) == expected
    assert torch.equal(weights(resumed.model), weights(straight.model))


def test_a_state_shares_nothing_that_goes_on_changing():
    run = training(encoded(16), microbatch_size=2, gradient_accumulation_steps=4)
    run.run_microbatch()
    other = training(encoded(16), microbatch_size=2, gradient_accumulation_steps=4)
    other.load_state_dict(run.state_dict())
    before = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    list(other)
    assert all(torch.equal(p.grad, kept) for p, kept in zip(run.model.parameters(), before, strict=True))


def test_another_config_or_other_examples_are_refused():
    state = training(encoded(8)).state_dict()
    with pytest.raises(ValueError, match=r"config: got .*'learning_rate': 0\.1.*expected .*0\.003"):
        training(encoded(8), learning_rate=0.1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"examples: got 9, checksum \w{8}; expected 8, checksum \w{8}, with which"):
        training(encoded(9)).load_state_dict(state)
    with pytest.raises(ValueError, match="examples: got 8, checksum"):
        training(encoded(8, seed=1)).load_state_dict(state)
    ids, is_response = encoded(8)[7]
    with pytest.raises(ValueError, match="examples: got 8, checksum"):
        training([*encoded(7), Encoded(ids, (*is_response[:-2], False, True))]).load_state_dict(state)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"d_model": 16}, r"token_embedding.weight \[259, 16\] torch.float32; expected \[259, 32\] torch.float32"),
        ({"num_layers": 2}, r"blocks.1.\S+ \[32\] torch.float32; expected none"),
        ({"num_layers": 0}, r"blocks.0.\S+ none; expected \[32\] torch.float32"),
    ],
)
def test_another_model_is_refused_and_nothing_has_changed(other: dict, text: str):
    run = training(encoded(16), microbatch_size=2)
    run.run_microbatch()
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "context_length": 32}
    another = training(encoded(16), TinyLM(**sizes | other), microbatch_size=2)
    before = weights(another.model)
    with pytest.raises(ValueError, match=f"^model: got {text}, with which the run began"):
        another.load_state_dict(run.state_dict())
    assert (another.step, another.microbatch) == (0, 0)
    assert torch.equal(weights(another.model), before)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rule": "mean"}, "rule: got 'mean'"),
        ({"microbatch_size": 0}, "microbatch_size: got 0; expected an integer of at least 1"),
        ({"microbatch_size": 2.0}, "microbatch_size: got 2.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"num_epochs": True}, "num_epochs: got True"),
        ({"warmup_steps": -1}, "warmup_steps: got -1"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"learning_rate": "1"}, "learning_rate: got '1'"),
        ({"max_norm": 0}, "max_norm: got 0"),
        ({"final_share": 1.5}, "final_share: got 1.5; expected a number above 0 up to 1"),
        ({"learning_rate": math.inf}, "learning_rate: got inf; expected a finite number above 0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay: got inf; expected a finite number of at least 0"),
        ({"weight_decay": "x"}, "weight_decay: got 'x'"),
        ({"weight_decay": None}, "weight_decay: got None"),
        ({"optimizer": "adam"}, "optimizer: got 'adam'; expected one of adamw, sgd"),
        ({"normalize_constant": 0.0}, "normalize_constant"),
    ],
)
def test_a_wrong_config_names_the_argument(wrong: dict, text: str):
    with pytest.raises((TypeError, ValueError)) as caught:
        TrainConfig(**wrong)
    assert text in str(caught.value)


def test_examples_without_a_response_are_refused():
    empty = [Encoded((1, 2, 3), (False, False, False))]
    with pytest.raises(ValueError, match="examples: got 1 without a response token"):
        training(empty)


class Broken(torch.nn.Module):
    """A model whose forward pass raises, or computes NaN."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.weight, self.error = torch.nn.Parameter(torch.zeros(259)), error

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.error:
            raise self.error
        return (self.weight * math.nan).expand(*input_ids.shape, 259)


@pytest.mark.parametrize(
    ("size", "advice"),
    [
        (6, "Try microbatch_size 3 with gradient_accumulation_steps 4:"),
        (5, "Try microbatch_size 2 with gradient_accumulation_steps 5:"),
        (1, "take shorter ones"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 5")],
)
def test_out_of_memory_says_what_would_fit(size: int, advice: str, error: RuntimeError):
    run = training(encoded(12), Broken(error), microbatch_size=size, gradient_accumulation_steps=2)
    with pytest.raises(OutOfMemory, match=advice):
        run.run_microbatch()


def test_advice_never_changes_the_minibatch():
    for size in range(2, 12):
        for steps in range(1, 5):
            config = {"microbatch_size": size, "gradient_accumulation_steps": steps}
            run = training(encoded(size * steps), Broken(torch.OutOfMemoryError()), **config)
            with pytest.raises(OutOfMemory) as caught:
                run.run_microbatch()
            smaller, more = map(int, re.search(r"microbatch_size (\d+) with \D+ (\d+)", str(caught.value)).groups())
            assert smaller * more == size * steps
            assert smaller <= size / 2


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"):
        training(encoded(4), Broken(RuntimeError("something else"))).run_microbatch()


def test_nan_stops_the_run_before_the_optimizer():
    run = training(encoded(4), Broken(None), microbatch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="got nan"):
        list(run)
    assert run.step == 0
    assert torch.equal(run.model.weight.detach(), torch.zeros(259))


class FailsOnce(TinyLM):
    """Raises in its third forward pass, or has a gradient there that is not finite."""

    error: BaseException | None = None

    def get_output_embeddings(self) -> torch.nn.Module:
        raise NotImplementedError  # or calls would be made to find out what can be done with it

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        logits = super().forward(input_ids)
        if self.calls == 3 and self.error:
            raise self.error
        if self.calls == 3:
            logits.register_hook(lambda gradient: gradient * math.inf)
        return logits


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (None, RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_after_a_failure_the_minibatch_begins_anew(error: BaseException | None, raised: type[BaseException]):
    config = {"microbatch_size": 2, "gradient_accumulation_steps": 3}
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "context_length": 32}
    straight = training(encoded(12), TinyLM(**sizes), **config)
    failing = training(encoded(12), FailsOnce(**sizes), **config)
    failing.model.error = error
    with pytest.raises(raised):
        list(failing)
    assert (failing.step, failing.microbatch) == (0, 0)
    assert all(parameter.grad is None for parameter in failing.model.parameters())
    for expected, record in zip(straight, failing, strict=True):
        assert record.nll == pytest.approx(expected.nll, rel=1e-5)
    assert compare(weights(failing.model), weights(straight.model)).relative_error < 1e-4


def test_config_is_plain_data():
    assert TrainConfig(**dataclasses.asdict(TrainConfig())) == TrainConfig()
