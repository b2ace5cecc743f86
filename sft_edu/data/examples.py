"""What a model is trained on: a prompt and its response, or a conversation. And what makes one unusable."""

from __future__ import annotations

import math
import random
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Example(NamedTuple):
    """What is asked, and what is to be answered."""

    prompt: str
    response: str


class Message(NamedTuple):
    """One turn of a conversation: `role` is one of `ROLES`."""

    role: str
    content: str


class Conversation(NamedTuple):
    """Turns in their order. The assistant's are what is to be answered, those among the first `num_given` excepted."""

    messages: tuple[Message, ...]
    num_given: int = 0

    @property
    def answers(self) -> list[int]:
        """Which messages are trained on."""
        turns = enumerate(self.messages)
        return [index for index, message in turns if index >= self.num_given and message.role == "assistant"]


def held_out(examples: Sequence[Example | Conversation], share: float, *, seed: int = 0) -> list[bool]:
    """Which examples to keep for a test: random ones, and with them all that ask the same.

    Questions that are asked more often than examples are wanted are left out of the choice.

    Args:
        examples: any number.
        share: of them, from 0 to 1: as many are held out or fewer, but at least one question if it is above 0, and at
            least one is not.
        seed: of the choice.

    Raises:
        ValueError: they cannot be divided, because all ask the same.
    """
    questions: dict[tuple[Message, ...], list[int]] = {}
    for index, example in enumerate(examples):
        if isinstance(example, Example):
            asked: tuple[Message, ...] = (Message("user", example.prompt),)
        else:
            asked = example.messages[: example.answers[0]]
        questions.setdefault(asked, []).append(index)
    if share and len(questions) < 2:
        raise ValueError(f"held_out: got {share} of {len(examples)} examples that all ask the same; expected 0")
    groups = list(questions.values())
    random.Random(seed).shuffle(groups)
    wanted = 0
    if share:
        wanted = max(min(round(share * len(examples)), len(examples) - 1), min(map(len, groups)))
    chosen = [False] * len(examples)
    for group in groups:
        if len(group) <= wanted:
            wanted -= len(group)
            for index in group:
                chosen[index] = True
    return chosen


class FieldError(ValueError):
    """A field of an example cannot be used. `field` is empty where the whole example is meant."""

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"got {got}; expected {expected}")
        self.field = field


def check_example(example: Example, fields: tuple[str, str] = Example._fields) -> None:
    """Refuse a prompt or response without text, under the names that they have where they come from."""
    for field, text in zip(fields, example, strict=True):
        check_text(field, text)


def check_conversation(conversation: Conversation, fields: Sequence[str] = (), whole: str = "messages") -> None:
    """Refuse turns of which nothing can be learned.

    Args:
        conversation: its fields may be of any type.
        fields: the name of each message in an error; `messages[0]`, `messages[1]` and so on if there are none.
        whole: the name of them all.

    Raises:
        FieldError: a role is unknown, a text is missing (a system message may be empty), no turn of the assistant is
            left to train on, or the first of them has nothing before it.
    """
    messages, num_given = conversation
    if not isinstance(messages, list | tuple):
        raise FieldError(whole, describe(messages), "a tuple of messages")
    if type(num_given) is not int or num_given < 0:
        raise FieldError("num_given", repr(num_given)[:40], "a count of messages")
    fields = fields or [f"messages[{index}]" for index in range(len(messages))]
    for field, message in zip(fields, messages, strict=True):
        if not isinstance(message, Message):
            raise FieldError(field, describe(message), "a Message")
        role, content = message
        if not isinstance(role, str) or role not in ROLES:
            given = short(role) if isinstance(role, str) else describe(role)
            raise FieldError(f"{field}.role", given, f"one of {', '.join(ROLES)}")
        check_text(f"{field}.content", content, may_be_empty=role == "system")
    if not conversation.answers:
        raise FieldError(whole, f"no turn of the assistant among {len(messages)}", "at least one, to train on")
    first = conversation.answers[0]
    if not any(message.content.strip() for message in messages[:first]):
        raise FieldError(fields[first], "a first turn of the assistant with nothing before it", "what it is to answer")


def check_text(field: str, text: object, *, may_be_empty: bool = False) -> None:
    """Refuse what is not a string, has nothing to read in it, or cannot be written as UTF-8.

    Raises:
        FieldError: the text says which.
    """
    if not isinstance(text, str):
        raise FieldError(field, describe(text), "text")
    if not may_be_empty and not text.strip():
        raise FieldError(field, "text of white space alone" if text else "an empty text", "text to read")
    if not may_be_empty and all(letter.isspace() or unicodedata.category(letter) == "Cf" for letter in text):
        raise FieldError(field, "text of invisible characters alone", "text to read")  # such as a byte order mark
    if "\0" in text:
        raise FieldError(field, f"a NUL character at position {text.index(chr(0))}", "text without it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half of a character, \\u{ord(text[error.start]):04x}, at position {error.start}"
            raise FieldError(field, half, "whole characters") from None


def describe(value: object) -> str:
    """What a value is, in the words of JSON: `null`, `true`, `a number`, `a list`, `an object`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    kinds = {str: "text", int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "an object"}
    return next((words for kind, words in kinds.items() if isinstance(value, kind)), type(value).__name__)


def short(text: str) -> str:
    """A text in quotes with nothing invisible in it, cut so that it fits into a line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
