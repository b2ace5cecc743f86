"""Held-out scores: what one forward pass says is what answering token by token would, and training does not notice."""

import math
from collections.abc import Sequence

import pytest
import torch
from test_encode import CHATML, MARKED, WORDS, hugging_face
from test_head import MODELS, rows_at
from test_train import encoded, tiny, weights
from torch import nn

from sft_edu.data.encode import Encoded, EncodedExamples, encode
from sft_edu.data.examples import Conversation, Example, Message
from sft_edu.data.tasks import make_examples
from sft_edu.model import TinyLM
from sft_edu.tokens import ByteTokenizer
from sft_edu.training.evaluate import Answer, Evaluation
from sft_edu.training.generate import greedy
from sft_edu.training.train import TrainConfig, Training

BYTES = ByteTokenizer()
SUMS = [Example("1 + 1 =", "2"), Example("2 + 2 =", "4"), Example("3 + 3 =", "6"), Example("4 + 4 =", "8")]
TALK = Conversation(
    (Message("user", "1 + 1"), Message("assistant", "2"), Message("user", "2 + 2"), Message("assistant", "4"))
)


class ByHeart(nn.Module):
    """Knows what comes next in some sequences; after anything else it says its token 0."""

    def __init__(self, sequences: Sequence[Sequence[int]], vocab_size: int = 300) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.vocab_size = vocab_size
        self.next = {tuple(ids[:end]): ids[end] for ids in sequences for end in range(1, len(ids))}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = input_ids.tolist()
        known = [[self.next.get(tuple(row[: end + 1]), 0) for end in range(len(row))] for row in rows]
        return nn.functional.one_hot(torch.tensor(known), self.vocab_size) * self.scale


def by_heart(examples, tokenizer=BYTES) -> ByHeart:
    return ByHeart([sequence.input_ids for sequence in (encode(examples, tokenizer) if examples else ())])


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, *map(hugging_face, (None, CHATML, MARKED, WORDS))],
    ids=("bytes", "plain", "chatml", "marked", "words"),
)
@pytest.mark.parametrize("known", [0, 1, 3, 4])
def test_those_that_are_known_are_right(tokenizer, known: int):
    scores = Evaluation(SUMS, tokenizer)(by_heart(SUMS[:known], tokenizer))
    assert scores.exact_match == known / 4
    assert [answer.is_right for answer in scores.answers] == [index < known for index in range(4)]
    assert [answer.answer == answer.expected for answer in scores.answers] == [index < known for index in range(4)]
    assert all(example.prompt in answer.prompt for example, answer in zip(SUMS, scores.answers, strict=True))
    assert (scores.nll < 0.01) == (known == 4)


def test_answers_are_texts_without_end_marks():
    for tokenizer in (BYTES, hugging_face(), hugging_face(CHATML), hugging_face(MARKED)):
        (answer,) = Evaluation(SUMS[:1], tokenizer)(by_heart(SUMS[:1], tokenizer)).answers
        assert (answer.expected, answer.answer) == ("2", "2")


def test_an_answer_that_does_not_end_is_wrong():
    endless = ByHeart([encode([Example("1 + 1 =", "2" + "2" * 50)], BYTES)[0].input_ids])
    scores = Evaluation(SUMS[:1], BYTES)(endless)
    assert scores.exact_match == 0
    assert scores.answers == (Answer("1 + 1 =", "2", "22", False),)


def test_of_a_conversation_every_turn_has_to_be_right():
    tokens = encode([TALK], BYTES)[0]
    last = tokens.input_ids
    assert Evaluation([TALK], BYTES)(ByHeart([last])).exact_match == 1
    only_last_turn = ByHeart([])
    only_last_turn.next = {tuple(last[:end]): last[end] for end in range(len(last) - 2, len(last))}
    scores = Evaluation([TALK], BYTES)(only_last_turn)
    assert scores.exact_match == 0
    assert scores.answers == (Answer(BYTES.decode(last[:-2]), "4", "4", True),)


def test_one_forward_pass_says_what_answering_would():
    examples = make_examples(60, seed=3, split="test")
    model = TinyLM(d_model=32, num_layers=1, context_length=32).double()
    config = TrainConfig(microbatch_size=16, gradient_accumulation_steps=1, warmup_steps=5)
    for _ in Training(model, encode(make_examples(4000), BYTES), config, pad_token_id=256):
        pass
    prompts, expected = zip(
        *((BYTES.encode(p, add_special_tokens=False), BYTES.encode(r, add_special_tokens=False)) for p, r in examples),
        strict=True,
    )
    answers = greedy(model, prompts, max_new_tokens=8, eos_token_id=258, pad_token_id=256)
    right = [answer == [*response, 258] for answer, response in zip(answers, expected, strict=True)]
    assert 0 < sum(right) < 60
    scores = Evaluation(examples, BYTES, batch_size=7, num_answers=60)(model)
    assert scores.exact_match == sum(right) / 60
    assert [answer.is_right for answer in scores.answers] == right


def test_nll_is_the_mean_over_response_tokens():
    model, sequences = tiny().double(), encode(SUMS, BYTES)
    total, count = 0.0, 0
    for ids, is_response in sequences:
        log_probs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0].detach()
        for place in range(1, len(ids)):
            if is_response[place]:
                total, count = total - float(log_probs[place - 1, ids[place]]), count + 1
    scores = Evaluation(SUMS, BYTES, batch_size=3)(model)
    assert math.isclose(scores.nll, total / count, rel_tol=1e-14)


class Small(ByteTokenizer):
    """For vocabularies of fewer than 256 tokens."""

    eos_token_id, pad_token_id = 1, 2


class AllPositions(nn.Module):
    """A model whose head is hidden, so that it is given every position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return getattr(output := self.model(input_ids), "logits", output)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_given_what_is_asked_for_and_nothing_changes(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    sequences = [Encoded((*range(10, 12 + size), 7, 9, 1), (False,) * (2 + size) + (True,) * 3) for size in range(9)]
    evaluation = Evaluation(EncodedExamples(tuple(sequences)), Small(), batch_size=4, num_answers=5)
    expected = evaluation(AllPositions(model))
    evaluation(model)  # the first finds out whether fewer positions will do
    seen = rows_at(model.get_output_embeddings())
    scores = evaluation(model)
    assert seen == [12, 12, 3, 5, 5, 5]  # three tokens of each example, and the last position of each answer
    assert math.isclose(scores.nll, expected.nll, rel_tol=1e-14)
    assert (scores.exact_match, scores.answers) == (expected.exact_match, expected.answers)


def test_what_is_longer_than_the_model_reads_is_cut_and_counted():
    model = TinyLM(d_model=32, num_layers=1, context_length=8)
    evaluation = Evaluation([Example("a long prompt ", "and a long answer"), Example("a", "b")], BYTES, max_length=9)
    assert evaluation.examples.truncated == 1
    scores = evaluation(model)
    assert len(scores.answers) == 2


def test_long_answers_are_shown_in_part():
    long = Example("a", "b" * 100)
    (answer,) = Evaluation([long], BYTES, longest_answer=5)(by_heart([long])).answers
    assert (answer.answer, answer.is_right) == ("bbbbb", False)
    assert Evaluation([long], BYTES, num_answers=0)(by_heart([long])).answers == ()


def test_training_does_not_notice():
    def run(evaluation=None):
        model = tiny()
        model.blocks.append(nn.Dropout(0.2))  # draws random numbers while it trains
        model.train()
        torch.manual_seed(0)
        training = Training(model, encoded(120), TrainConfig(microbatch_size=2), pad_token_id=256)
        while not training.finished:
            training.run_microbatch()
            if evaluation:
                evaluation(model)
        return weights(model)

    assert torch.equal(run(Evaluation(SUMS, BYTES)), run())


def test_the_same_model_gets_the_same_scores():
    model = tiny()
    assert Evaluation(SUMS, BYTES)(model) == Evaluation(SUMS, BYTES)(model)
