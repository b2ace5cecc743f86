"""An example as token ids, and where its answers lie: in plain text, or in the chat template of a tokenizer."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from sft_edu.data.examples import Conversation, Example, FieldError, Message

if TYPE_CHECKING:
    from sft_edu.tokens import Tokenizer


_NO_TOKEN = ("text of which the tokenizer makes no token", "at least one")


class Tokens(NamedTuple):
    """Token ids up to the end of the last answer, and each answer as `(start, stop)`, its end mark included.

    `mark` is how many tokens the end mark of the last answer has.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    mark: int = 1


class PlainText:
    """Texts as they are, tokenized apart so that borders are exact, and eos after each answer.

    The turns of a conversation are `role:`, a new line, the content, eos if it is the assistant's, and a new line.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer: Any = tokenizer

    def __call__(self, example: Example | Conversation) -> Tokens:
        tokens = Tokens([], [])
        if isinstance(example, Example):
            self._add(tokens, example.prompt, "prompt")
            self._add_answer(tokens, example.response, "response")
            return tokens
        before = ""
        for index, (role, content) in enumerate(example.messages[: example.answers[-1] + 1]):
            if role == "assistant":
                self._add(tokens, f"{before}{role}:\n", "messages")
                self._add_answer(tokens, content, f"messages[{index}].content", is_given=index < example.num_given)
                before = "\n"
            else:
                before += f"{role}:\n{content}\n"
        return tokens

    def _add_answer(self, tokens: Tokens, text: str, field: str, *, is_given: bool = False) -> None:
        start = len(tokens.ids)
        self._add(tokens, text, field)
        tokens.ids.append(self.tokenizer.eos_token_id)
        if not is_given:
            tokens.answers.append((start, len(tokens.ids)))

    def _add(self, tokens: Tokens, text: str, field: str) -> None:
        ids = _token_ids(text, self.tokenizer)
        if not ids:
            raise FieldError(field, *_NO_TOKEN)
        tokens.ids.extend(ids)


class ChatTemplate:
    """Conversations as `tokenizer.apply_chat_template` renders them. A prompt and its response are two turns of one.

    A template with `{% generation %}` says itself where the answers lie. With any other, an answer begins where the
    rendering of the turns before it, with `add_generation_prompt`, ends, and stops with its end-of-turn token. That
    is exact if those tokens are the first ones of the whole; where they are not, the example is refused.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer: Any = tokenizer
        self.special = special_tokens(tokenizer)
        # Without a fast tokenizer nothing tells which characters a token stands for.
        self.knows_answers = getattr(tokenizer, "is_fast", False) and bool(
            re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())  # type: ignore[attr-defined]
        )

    def __call__(self, example: Example | Conversation) -> Tokens:
        if isinstance(example, Example):
            conversation = Conversation((Message("user", example.prompt), Message("assistant", example.response)))
        else:
            conversation = example
        for index in conversation.answers:
            if not self._ids(conversation.messages[index].content):
                field = "response" if isinstance(example, Example) else f"messages[{index}].content"
                raise FieldError(field, *_NO_TOKEN)
        # Later turns cannot be learned from, but could change how a template renders the earlier ones.
        conversation = conversation._replace(messages=conversation.messages[: conversation.answers[-1] + 1])
        ids, answers = (self._by_mask if self.knows_answers else self._by_prefixes)(conversation)
        start, stop = answers[-1]
        last = self._last_special(ids, start, stop)
        return Tokens(ids[:stop], answers, 1 if last is None else stop - last)

    def _by_mask(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        output = self._render(conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, runs, place = output["input_ids"], [], 0
        for is_answer, run in groupby(output["assistant_masks"]):
            start, place = place, place + len(list(run))
            runs += [(start, place)] * is_answer
        turns = sum(message.role == "assistant" for message in conversation.messages)
        if len(runs) != turns:
            raise FieldError("", f"a chat template that marks {len(runs)} answers of {turns}", "each marked apart")
        answers = []
        for index, (start, stop) in zip(conversation.answers, runs[-len(conversation.answers) :], strict=True):
            content = conversation.messages[index].content
            # A template may mark the text and leave out the token that ends the turn.
            stop += self._is_open(ids[start:stop], content) and stop < len(ids) and ids[stop] in self.special
            self._check(ids[start:stop], content, index)
            answers.append((start, stop))
        return ids, answers

    def _by_prefixes(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        messages = conversation.messages
        whole, answers = self._render(messages), []
        ids = self._ids(whole)
        for index in conversation.answers:
            before = self._render(messages[:index], add_generation_prompt=True)
            through = whole if index == len(messages) - 1 else self._render(messages[: index + 1])
            if not whole.startswith(through) or not through.startswith(before):
                found = (
                    f"a chat template that changes the text up to turn {index + 1} once that or a later turn follows"
                )
                raise FieldError("", found, "one that only appends, or one that marks answers with {% generation %}")
            content = messages[index].content
            begins_with_content = through[len(before) :].lstrip().startswith(content.strip())
            if not begins_with_content and before == self._render(messages[:index]):
                raise FieldError("", "a chat template that ignores add_generation_prompt", "one that heeds it")
            start, stop = self._length_of_prefix(before, ids, index), self._length_of_prefix(through, ids, index)
            last = self._last_special(ids, start, stop)
            stop = stop if last is None else last + 1
            self._check(ids[start:stop], content, index)
            answers.append((start, stop))
        return ids, answers

    def _length_of_prefix(self, text: str, ids: list[int], index: int) -> int:
        prefix = self._ids(text)
        if ids[: len(prefix)] != prefix:
            found = f"a token that joins the answer in turn {index + 1} to the text around it"
            raise FieldError("", found, "an answer that begins without white space, or another chat template")
        return len(prefix)

    def _last_special(self, ids: list[int], start: int, stop: int) -> int | None:
        """Where the special token is that ends an answer. None if text follows the last one: then text is the mark."""
        last = next((place for place in reversed(range(start, stop)) if ids[place] in self.special), None)
        return None if last is None or self.tokenizer.decode(ids[last + 1 : stop]).strip() else last

    def _check(self, answer: list[int], content: str, index: int) -> None:
        """Refuse an answer without its text, as a template for pictures may render it, or without an end mark."""
        text = "".join(self._text(self._ids(content)).split())
        if text not in "".join(self._text(answer).split()):
            found = f"a chat template that leaves out or changes the text of turn {index + 1}"
            raise FieldError("", found, "one that keeps all but white space")
        if self._is_open(answer, content):
            raise FieldError("", "a chat template that ends an answer without a token", "an end mark, such as eos")

    def _is_open(self, answer: list[int], content: str) -> bool:
        if self._last_special(answer, 0, len(answer)) is not None:
            return False
        text, whole, stripped = (self._text(ids) for ids in (answer, self._ids(content), self._ids(content.strip())))
        return text == whole or text.endswith(stripped)  # some templates strip white space

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).lstrip()  # a few tokenizers begin each text with a space

    def _ids(self, text: str) -> list[int]:
        return _token_ids(text, self.tokenizer)

    def _render(self, messages: tuple[Message, ...], *, tokenize: bool = False, **options: bool) -> Any:
        turns = [message._asdict() for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=tokenize, **options)
        except Exception as error:  # a template is a program of its own
            found = f"an error from the tokenizer or its chat template, {error}"
            raise FieldError("", found, "turns that it can render") from error


def special_tokens(tokenizer: Tokenizer) -> set[int]:
    """The tokens that stand for no text, such as eos and the marks of a chat template."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {*getattr(tokenizer, "all_special_ids", ()), tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return known | {token for token, kind in added.items() if kind.special}


def _token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # a Hugging Face tokenizer raises this very class for a word that it does not know
        raise FieldError("", f"an error from the tokenizer, {error}", "text that it can encode") from error
