"""From examples to token ids, each with its response mask, and from those to a padded microbatch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, overload

import torch

from sft_edu.data.chat import ChatTemplate, PlainText, Tokens
from sft_edu.data.examples import Conversation, Example, FieldError, check_conversation, check_example
from sft_edu.digits import number_of

if TYPE_CHECKING:
    from sft_edu.tokens import Tokenizer

SHORTEST = 3  # one token of the prompt, one of the response, and its end mark


class Encoded(NamedTuple):
    """One sequence: T token ids, and for each whether it is part of a response."""

    input_ids: tuple[int, ...]
    is_response: tuple[bool, ...]


@dataclass(frozen=True)
class EncodedExamples(Sequence[Encoded]):
    """Sequences to train on, one for each example. Printed, it says in a sentence what was cut.

    Args:
        sequences: see `Encoded`. The last token of each is a response token.
        max_length: tokens of the longest that was allowed, or None.
        truncated: how many examples were longer, and lost their first tokens or some before the end.
        cut_responses: how many of those lost response tokens too.
    """

    sequences: tuple[Encoded, ...] = field(repr=False)
    max_length: int | None = None
    truncated: int = 0
    cut_responses: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Encoded, ...]: ...

    def __getitem__(self, index: int | slice) -> Encoded | tuple[Encoded, ...]:
        return self.sequences[index]

    def __str__(self) -> str:
        tokens = sum(len(sequence.input_ids) for sequence in self)
        in_responses = sum(sum(sequence.is_response) for sequence in self)
        text = f"{number_of(len(self), 'example')}, {tokens:,} tokens, {in_responses:,} of them in responses."
        if self.truncated:
            text += f" Cut to {self.max_length:,} tokens: {number_of(self.truncated, 'example')}"
            text += f"; response tokens were lost in {self.cut_responses:,}."
        return text


def encode(
    examples: Sequence[Example | Conversation],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    *,
    chat_template: bool = True,
) -> EncodedExamples:
    """Token ids of each example, and which of them are the response's.

    Without a chat template prompt and response are tokenized as they are, apart and without special tokens, so that
    the border between them is exact; a conversation becomes plain text, see `PlainText`. Each response ends with eos,
    which is a response token.

    With the chat template of a Hugging Face tokenizer conversations are what the template renders, and a prompt with
    its response is one of two turns, user and assistant; see `ChatTemplate`. The token that ends a turn of the
    assistant is a response token; what the template puts behind it is not, unless the template marks it as one.
    `chat_template=False` is for prompts that have a form of their own.

    Tokens behind the last response are left out: nothing is learned from them. An example that is longer than
    `max_length` loses its oldest tokens, and a response that thereby loses its first token, or all before it, is not
    trained on. If the last response alone is too long, its beginning and its end mark are kept, and the one token
    before it. The result counts both cases.

    A special token that is written out in a text, such as `</s>`, is that token: Hugging Face tokenizers read it so.

    Args:
        examples: what `load_jsonl` or `make_examples` returns; at least one.
        tokenizer: see `Tokenizer`.
        max_length: of a sequence in tokens, at least 3. A model that reads L tokens can take sequences of L + 1.
        chat_template: whether to use the tokenizer's template, if it has one.

    Raises:
        TypeError: an argument or an example is of another type.
        ValueError: there are no examples; one has nothing to read in a field, or no token; the tokenizer has no eos;
            or the chat template cannot render a conversation, or not so that its answers can be told from the rest.
            The text names the argument or the example.

    >>> from sft_edu import ByteTokenizer
    >>> encoded = encode([Example("2 + 2 = ", "4")], ByteTokenizer())
    >>> encoded[0].is_response
    (False, False, False, False, False, False, False, False, True, True)
    >>> print(encode([Example("2 + 2 = ", "4")], ByteTokenizer(), max_length=5))
    1 example, 5 tokens, 2 of them in responses. Cut to 5 tokens: 1 example; response tokens were lost in 0.
    """
    _check_arguments(examples, tokenizer, max_length)
    has_template = chat_template and getattr(tokenizer, "chat_template", None)
    if not has_template and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: got one without an eos token; expected one, every response ends with it")
    tokens_of = (ChatTemplate if has_template else PlainText)(tokenizer)
    sequences, truncated, cut_responses = [], 0, 0
    for index, example in enumerate(examples):
        try:
            whole = _tokens(example, tokens_of)
        except FieldError as error:
            place = f"examples[{index}]" + (f".{error.field}" if error.field else "")
            raise ValueError(f"{place}: {error}") from error.__cause__
        fitted = _fit(whole, max_length)
        truncated += len(fitted.ids) < len(whole.ids)
        cut_responses += _num_trained(fitted) < _num_trained(whole)
        sequences.append(_encoded(fitted))
    return EncodedExamples(tuple(sequences), max_length, truncated, cut_responses)


def _check_arguments(examples: object, tokenizer: object, max_length: object) -> None:
    if isinstance(examples, str | Example | Conversation) or not isinstance(examples, Sequence):
        raise TypeError(f"examples: got {type(examples).__name__}; expected a list of Example and Conversation")
    for index, example in enumerate(examples):
        if not isinstance(example, Example | Conversation):
            raise TypeError(f"examples[{index}]: got {type(example).__name__}; expected an Example or a Conversation")
    if not examples:
        raise ValueError("examples: got none; expected at least one")
    if not all(hasattr(tokenizer, name) for name in ("encode", "decode", "eos_token_id")):
        raise TypeError(f"tokenizer: got {type(tokenizer).__name__}; expected a Tokenizer, with encode and decode")
    if max_length is not None and (type(max_length) is not int or max_length < SHORTEST):
        raise ValueError(f"max_length: got {max_length!r}; expected None or an integer of at least {SHORTEST}")


def _tokens(example: Example | Conversation, tokens_of: PlainText | ChatTemplate) -> Tokens:
    if isinstance(example, Example):
        check_example(example)
    else:
        check_conversation(example)
    tokens = tokens_of(example)
    if tokens.answers[0][0] < 1:
        raise FieldError("", "a response without a token before it", "one to predict it from")
    return tokens


def _fit(tokens: Tokens, max_length: int | None) -> Tokens:
    """The newest tokens, at most `max_length`, one of them before the first answer."""
    ids, answers, mark = tokens
    start, stop = answers[-1]
    if max_length is None or stop <= max_length:
        return tokens
    if stop - start < max_length:
        dropped = stop - max_length
        # An answer whose first token is gone, or has nothing before it, is context for those that follow.
        kept = [(start - dropped, stop - dropped) for start, stop in answers if start > dropped]
        return Tokens(ids[dropped:], kept, mark)
    end = ids[stop - mark :][: max_length - 1]
    return Tokens(ids[start - 1 :][: max_length - len(end)] + end, [(1, max_length)], mark)


def _num_trained(tokens: Tokens) -> int:
    return sum(stop - start for start, stop in tokens.answers)


def _encoded(tokens: Tokens) -> Encoded:
    is_response = [False] * len(tokens.ids)
    for start, stop in tokens.answers:
        is_response[start:stop] = [True] * (stop - start)
    return Encoded(tuple(tokens.ids), tuple(is_response))


def fingerprint(examples: Sequence[Encoded]) -> str:
    """How many examples, and a number that is another for other tokens, responses or another order of them."""
    checksum = 0
    for input_ids, is_response in examples:
        checksum = zlib.crc32(repr(input_ids).encode() + bytes(is_response), checksum)
    return f"{len(examples)}, checksum {checksum:08x}"


def padding_token(tokenizer: Tokenizer) -> int:
    """The token that fills the shorter sequences of a microbatch: pad, or else eos, or else 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def collate(sequences: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad sequences on the right to the longest, and shift the labels by one.

    Args:
        sequences: B, of which one has at least two tokens.
        pad_token_id: what fills the shorter ones; their mask is 0 there.

    Returns:
        `input_ids` and `labels`, int64, and `response_mask`, bool, each `[B, longest - 1]`, on the CPU; see
        `tokenize_prompt_and_output`.
    """
    longest = max(len(sequence.input_ids) for sequence in sequences)
    tokens = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64, device="cpu")
    is_response = torch.zeros((len(sequences), longest), dtype=torch.bool, device="cpu")
    for row, (ids, mask) in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
        is_response[row, : len(ids)] = torch.tensor(mask, dtype=torch.bool, device="cpu")
    # Copies: labels that shared their memory with the inputs would change them when written to.
    columns = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": is_response[:, 1:]}
    return {name: column.contiguous() for name, column in columns.items()}
