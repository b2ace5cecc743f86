"""People's own examples: a file with one JSON object on each line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from sft_edu.data.examples import (
    Conversation,
    Example,
    FieldError,
    Message,
    check_conversation,
    check_example,
    describe,
    short,
)

MAX_LINE_BYTES = 10_000_000
"""A longer line is refused before it is read to its end. Reading a hostile one takes up to 30 times its size."""

_FORMS = '{"prompt", "response"}, {"prompt", "completion"} or {"messages"}'
_ANSWERS = ("response", "completion", "messages")
_WHITE = b" \t\r\n"


class JsonlError(ValueError):
    """A file cannot be used. `path`, `line` (from 1, None for the whole file) and `field` say where; so does the text.

    `field` is empty where the whole line is meant.
    """

    def __init__(self, path: str, line: int | None, field: str, problem: str) -> None:
        super().__init__(", ".join([path, *([f"line {line}"] if line else []), *([field] if field else [])]) + problem)
        self.path, self.line, self.field = path, line, field


def load_jsonl(path: str | os.PathLike[str]) -> list[Example | Conversation]:
    r"""Read examples from a file of UTF-8 text, one JSON object on each line, in any of these forms:

        {"prompt": "2 + 2 =", "response": "4"}
        {"prompt": "2 + 2 =", "completion": "4"}
        {"messages": [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]}
        {"prompt": [{"role": "user", "content": "2 + 2 ="}], "completion": [{"role": "assistant", "content": "4"}]}

    Roles are system, user and assistant. Each turn of the assistant is trained on; in the last form those of the prompt
    are not. A conversation has something before the first turn that is trained on. A system message may be empty, any
    other text may not.

    Other fields are ignored, as is `prompt` beside `messages`. So are blank lines, a byte order mark at the start and
    the `\r` of lines that end with `\r\n`. A line has at most `MAX_LINE_BYTES` bytes.

    Raises:
        JsonlError: a line cannot be used or there is none. The text names file, line and field, what was found and
            what is expected. It is the first such line.
        OSError: the file cannot be read. The text names it.
    """
    examples = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            try:
                if _is_within_limit(line).strip(_WHITE):
                    examples.append(_example(_parse(line)))
            except FieldError as error:
                raise JsonlError(str(path), number, error.field, f": {error}") from None
    if not examples:
        raise JsonlError(str(path), None, "", f": got a file without examples; expected lines like {_FORMS}")
    return examples


def _lines(file: BinaryIO) -> Iterator[bytes]:
    yield file.readline(MAX_LINE_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    yield from iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")


def _is_within_limit(line: bytes) -> bytes:
    if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise FieldError("", f"more than {MAX_LINE_BYTES:,} bytes", "a shorter line")
    return line


def _parse(line: bytes) -> object:
    """The JSON value of one line."""
    if b"\0" in line:
        raise FieldError("", f"a NUL byte at byte {line.index(0) + 1}", "UTF-8 text")
    try:
        text = line.rstrip(_WHITE).decode()
    except UnicodeDecodeError as error:
        found = f"the byte 0x{line[error.start]:02x} at byte {error.start + 1}, which is not UTF-8"
        raise FieldError("", found, "UTF-8 text") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        found = f"no JSON ({error.msg.removesuffix(' at')} at column {error.pos + 1})"
        raise FieldError("", found, "one whole JSON object on each line") from None
    except RecursionError:
        raise FieldError("", "lists or objects nested too deep to read", "a flat JSON object") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise FieldError("", f"the field {short(name)} twice in one object", "each field once")
            seen.add(name)
    return fields


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)  # Python refuses to read an integer of 4,301 digits


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def _example(fields: object) -> Example | Conversation:
    """One checked example from the JSON value of a line."""
    if not isinstance(fields, dict):
        raise FieldError("", describe(fields), f"one JSON object on each line, like {_FORMS}")
    answers = [name for name in _ANSWERS if name in fields]
    if len(answers) > 1:
        raise FieldError(answers[1], f"it beside {answers[0]!r}", "one of them")
    if not answers and "prompt" not in fields:
        raise FieldError("", _names(list(fields)), f"the fields {_FORMS}")
    if not answers:
        raise FieldError("response", "no such field", "what the prompt is to be answered with")
    if answers == ["messages"]:
        return _conversation({"messages": fields["messages"]}, num_given=0)
    if "prompt" not in fields:
        raise FieldError("prompt", "no such field", f"what {answers[0]!r} answers")
    given = {name: fields[name] for name in ("prompt", *answers)}
    if any(isinstance(value, list) for value in given.values()):
        return _conversation(given, num_given=len(given["prompt"]) if isinstance(given["prompt"], list) else 0)
    prompt, response = given
    example = Example(given[prompt], given[response])
    check_example(example, (prompt, response))
    return example


def _conversation(lists: dict[str, object], num_given: int) -> Conversation:
    """One conversation from one list of messages or several, by the names of their fields."""
    messages, fields = [], []
    for name, values in lists.items():
        if not isinstance(values, list):
            raise FieldError(name, describe(values), "a list of messages")
        fields += [f"{name}[{index}]" for index in range(len(values))]
        messages += [_message(f"{name}[{index}]", value) for index, value in enumerate(values)]
    conversation = Conversation(tuple(messages), num_given)
    check_conversation(conversation, fields, whole=list(lists)[-1])
    return conversation


def _message(field: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise FieldError(field, describe(value), 'an object {"role", "content"}')
    for name in Message._fields:
        if name not in value:
            raise FieldError(f"{field}.{name}", "no such field", 'an object {"role", "content"}')
    return Message(value["role"], value["content"])


def _names(fields: Sequence[str]) -> str:
    """The fields of an object: the first few of them, since there may be thousands."""
    names = [short(name) for name in list(fields)[:5]]
    return f"the fields {', '.join(names)}{', ...' * (len(fields) > 5)}" if names else "an object without fields"
