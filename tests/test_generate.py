"""Greedy answers: the most probable token each time, whatever runs beside it, and nothing of the model is disturbed."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sft_edu.model import TinyLM
from sft_edu.training.generate import greedy, undisturbed

EOS, PAD = 5, 0


class Successor(nn.Module):
    """After token t comes t + 1, for certain; it writes down what it was given."""

    def __init__(self, vocab_size: int = 10) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.vocab_size, self.seen = vocab_size, []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(input_ids.shape))
        assert not self.training
        assert not torch.is_grad_enabled()
        return nn.functional.one_hot((input_ids + 1) % self.vocab_size, self.vocab_size) * self.scale


def test_it_goes_on_until_eos():
    answers = greedy(Successor(), [[1], [9, 3], [2]], max_new_tokens=9, eos_token_id=EOS, pad_token_id=PAD)
    assert answers == [[2, 3, 4, 5], [4, 5], [3, 4, 5]]


def test_several_tokens_may_end_an_answer():
    assert greedy(Successor(), [[1], [6]], max_new_tokens=9, eos_token_id={EOS, 8}) == [[2, 3, 4, 5], [7, 8]]


def test_an_answer_is_cut_at_its_longest_and_at_the_context():
    assert greedy(Successor(), [[1], [3]], max_new_tokens=2, eos_token_id=EOS) == [[2, 3], [4, 5]]
    model = Successor()
    answers = greedy(model, [[0, 0, 0, 6], [6], [0] * 5], max_new_tokens=9, eos_token_id=EOS, context_length=4)
    # Four tokens are read, and the fifth is predicted from them.
    assert answers == [[7], [7, 8, 9, 0], []]
    assert max(length for _, length in model.seen) == 4


def test_finished_ones_cost_nothing_more():
    model = Successor()
    greedy(model, [[0] * 20 + [4], [1]], max_new_tokens=9, eos_token_id=EOS)
    assert [length for _, length in model.seen] == [21, 2, 3, 4]


def test_an_object_with_logits_will_do():
    class Wrapped(Successor):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids))

    assert greedy(Wrapped(), [[3]], max_new_tokens=3, eos_token_id=EOS) == [[4, 5]]


def test_company_changes_no_answer():
    model, chance = TinyLM(d_model=32, num_layers=2, context_length=40).double(), random.Random(0)
    prompts = [[chance.randrange(256) for _ in range(chance.randint(1, 20))] for _ in range(130)]  # two forward passes
    together = greedy(model, prompts, max_new_tokens=12, eos_token_id=258, pad_token_id=256)
    alone = [greedy(model, [prompt], max_new_tokens=12, eos_token_id=258, pad_token_id=7)[0] for prompt in prompts]
    assert together == alone
    for prompt, answer in zip(prompts[:5], alone, strict=False):
        for place, token in enumerate(answer):
            logits = model(torch.tensor([prompt + answer[:place]]))
            assert int(logits[0, -1].argmax()) == token


def test_the_model_and_the_random_numbers_are_as_before():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Dropout())
    model.train()
    model[1].eval()  # one of them frozen
    before = torch.get_rng_state()
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        raise ZeroDivisionError
    assert model[2].training
    assert torch.is_grad_enabled()
