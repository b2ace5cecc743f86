"""People's own examples: a file with one JSON object on each line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
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

MOST_PROBLEMS = 10
"""Bad lines that are named at once. After so many nothing more is read."""

_FORMS = '{"prompt", "response"}, {"prompt", "completion"} or {"messages"}'
_ANSWERS = ("response", "completion", "messages")
_WHITE = b" \t\r\n"


class JsonlError(ValueError):
    """A file cannot be used. The text has a line for each problem.

    `path`, `line` (from 1, None for the whole file) and `field` (empty for the whole line) say where the first one is.
    """

    def __init__(self, path: str, problems: Sequence[tuple[int | None, str, str]]) -> None:
        """Of problems as (line, field, what is wrong), at least one and at most `MOST_PROBLEMS`."""
        lines = [f"{_place(path, line, field)}: {problem}" for line, field, problem in problems]
        if len(problems) == MOST_PROBLEMS:
            lines.append(f"{path}: nothing was read after the first {MOST_PROBLEMS} lines that cannot be used")
        super().__init__("\n".join(lines))
        self.path, (self.line, self.field, _) = path, problems[0]


def _place(path: str, line: int | None, field: str) -> str:
    return ", ".join([path, *([f"line {line}"] if line else []), *([field] if field else [])])


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
        JsonlError: lines cannot be used or there is none. The text names file, line and field, what was found and
            what is expected, of the first `MOST_PROBLEMS` such lines.
        OSError: the file cannot be read. The text names it.
    """
    examples: list[Example | Conversation] = []
    problems: list[tuple[int | None, str, str]] = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            try:
                if _is_within_limit(line).strip(_WHITE):
                    examples.append(_example(_parse(line)))
            except FieldError as error:
                problems.append((number, error.field, str(error)))
                if len(problems) == MOST_PROBLEMS:
                    break
    if not examples and not problems:
        problems = [(None, "", f"got a file without examples; expected lines like {_FORMS}")]
    if problems:
        raise JsonlError(str(path), problems)
    return examples


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Each line; the last one is the first that is too long, since what comes next would be the rest of it."""
    line = file.readline(MAX_LINE_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    while line:
        yield line
        line = b"" if _is_too_long(line) else file.readline(MAX_LINE_BYTES + 1)


def _is_too_long(line: bytes) -> bool:
    return len(line) > MAX_LINE_BYTES and not line.endswith(b"\n")


def _is_within_limit(line: bytes) -> bytes:
    if _is_too_long(line):
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
        comma = _comma_too_many(text, error)
        found = f"{error.msg.removesuffix(' at')} at column {error.pos + 1}"
        found = found if comma is None else f"a comma too many at column {comma + 1}"
        is_list = text.lstrip().startswith(("[", "]"))
        expected = "one whole JSON object on each line" + ", not a list" * is_list
        raise FieldError("", f"no JSON ({found})", expected) from None
    except RecursionError:
        raise FieldError("", "lists or objects nested too deep to read", "a flat JSON object") from None


def _comma_too_many(text: str, error: json.JSONDecodeError) -> int | None:
    """Where the error is a comma before the end of an object or a list, or after the whole object."""
    comma = text.rfind(",", 0, error.pos + 1)
    after = text[comma + 1 :].lstrip()
    is_last = after[:1] in ("}", "]") or (not after and error.msg == "Extra data")
    return comma if comma >= 0 and is_last and not text[comma + 1 : error.pos].strip() else None


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
        raise FieldError(answers[1], f"both {answers[0]!r} and {answers[1]!r}", "one of the two")
    if not answers and "prompt" not in fields:
        found = f"the fields {_names(fields)}" if fields else "an object without fields"
        raise FieldError("", found, f"the fields {_FORMS}")
    if not answers:
        raise FieldError("response", _missing(fields), "what the prompt is to be answered with")
    if answers == ["messages"]:
        return _conversation({"messages": fields["messages"]}, num_given=0)
    if "prompt" not in fields:
        raise FieldError("prompt", _missing(fields), f"what {answers[0]!r} answers")
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
            raise FieldError(f"{field}.{name}", _missing(value), 'an object {"role", "content"}')
    return Message(value["role"], value["content"])


def _missing(fields: Mapping[str, object]) -> str:
    """That a field is not there, and what is: its name may be misspelt."""
    return f"no such field, only {_names(fields)}" if fields else "no such field"


def _names(fields: Mapping[str, object]) -> str:
    """The fields of an object: the first few of them, since there may be thousands."""
    return ", ".join(map(short, islice(fields, 5))) + ", ..." * (len(fields) > 5)
