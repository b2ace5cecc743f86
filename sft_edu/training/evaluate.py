"""How well a model answers what it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from sft_edu.data.chat import special_tokens
from sft_edu.data.encode import Encoded, EncodedExamples, collate, encode, padding_token
from sft_edu.data.examples import Conversation, Example
from sft_edu.head import selected_logits
from sft_edu.log_probs import log_probs_of
from sft_edu.training.generate import greedy, undisturbed
from sft_edu.training.pretrained import context_length

if TYPE_CHECKING:
    from sft_edu.tokens import Tokenizer


class Answer(NamedTuple):
    """What the model says to a prompt, as text without end marks, and whether it is what was expected."""

    prompt: str
    expected: str
    answer: str
    is_right: bool


@dataclass(frozen=True)
class Scores:
    """Of a model on held-out examples.

    `exact_match` is the share of examples that it answers token for token, end mark included, from 0 to 1; `nll` is
    `-log p` per response token, in nats; `answers` are some of its answers.
    """

    exact_match: float
    nll: float
    answers: tuple[Answer, ...]

    def as_dict(self) -> dict[str, object]:
        """As it stands in a line of `metrics.jsonl`."""
        return {
            "held_out_exact_match": self.exact_match,
            "held_out_nll": self.nll,
            "answers": [answer._asdict() for answer in self.answers],
        }


class Evaluation:
    """Scores a model on held-out examples.

        evaluation = Evaluation(make_examples(300, split="test"), ByteTokenizer())
        evaluation(model).exact_match

    Whether the greedy answer is the expected one takes a single forward pass: it is if each expected token is the most
    probable one after those before it. Of a conversation every turn that is trained on has to be. Only the answers
    that are shown are generated token by token; of a conversation that is the last turn.

    The same model gets the same scores, and its training goes on as if nobody had looked; see `undisturbed`.

    Args:
        examples: what `load_jsonl` or `make_examples` returns, at least one, or what `encode` made of it.
        tokenizer: see `Tokenizer`.
        max_length: see `encode`, which makes tokens of the examples.
        chat_template: see `encode`.
        num_answers: how many of the first examples are shown with their answers.
        longest_answer: tokens after which a shown answer is cut, if the expected ones are longer.
        batch_size: examples in one forward pass.

    Raises:
        TypeError, ValueError: see `encode`.
    """

    def __init__(
        self,
        examples: Sequence[Example | Conversation] | EncodedExamples,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        chat_template: bool = True,
        num_answers: int = 6,
        longest_answer: int = 64,
        batch_size: int = 64,
    ) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        if not isinstance(examples, EncodedExamples):
            examples = encode(examples, tokenizer, max_length, chat_template=chat_template)
        self.examples = examples
        """The held-out examples as tokens; printed, they say what was cut."""
        self._asked = [_split(sequence) for sequence in self.examples[:num_answers]]
        self._longest = min(longest_answer, max((len(expected) for _, expected in self._asked), default=0))
        self._special = special_tokens(tokenizer)

    def __call__(self, model: nn.Module) -> Scores:
        """Score the model, on the device where it is."""
        device, pad = next(model.parameters()).device, padding_token(self.tokenizer)
        num_right, log_prob, num_tokens = 0, 0.0, 0
        with undisturbed(model):
            for start in range(0, len(self.examples), self.batch_size):
                batch = collate(self.examples[start : start + self.batch_size], pad)
                input_ids, labels, mask = (tensor.to(device) for tensor in batch.values())
                # Only where there is something to answer: logits of a large vocabulary take much memory.
                logits = selected_logits(model, input_ids, mask.flatten().nonzero().squeeze(-1))
                expected, is_wrong = labels[mask], torch.zeros_like(mask)
                is_wrong[mask] = logits.argmax(-1) != expected
                num_right += int((~is_wrong.any(-1)).sum())
                log_prob += float(log_probs_of(logits, expected).sum())
                num_tokens += len(expected)
        return Scores(num_right / len(self.examples), -log_prob / max(num_tokens, 1), self._answers(model))

    def _answers(self, model: nn.Module) -> tuple[Answer, ...]:
        if not self._asked:
            return ()
        given = greedy(
            model,
            [prompt for prompt, _ in self._asked],
            max_new_tokens=self._longest,
            eos_token_id=self._ends(),
            pad_token_id=padding_token(self.tokenizer),
            context_length=context_length(model),
        )
        return tuple(
            Answer(
                self.tokenizer.decode(prompt),
                self._text(expected),
                self._text(answer),
                tuple(answer) == tuple(expected),
            )
            for (prompt, expected), answer in zip(self._asked, given, strict=True)
        )

    def _ends(self) -> set[int]:
        """What ends an answer: eos, and the special tokens that a chat template ends it with."""
        ends = {expected[-1] for _, expected in self._asked} & self._special
        return ends if self.tokenizer.eos_token_id is None else ends | {self.tokenizer.eos_token_id}

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token not in self._special])


def _split(sequence: Encoded) -> tuple[list[int], list[int]]:
    """The tokens before the last response, and those of it. It stands at the end of the sequence."""
    start = len(sequence.input_ids)
    while start > 1 and sequence.is_response[start - 1]:
        start -= 1
    return list(sequence.input_ids[:start]), list(sequence.input_ids[start:])
