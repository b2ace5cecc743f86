"""Files of people's own examples: what loads, what is refused and in which words, and that nothing crashes later."""

import json
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sft_edu import ByteTokenizer, TinyLM
from sft_edu.data import jsonl
from sft_edu.data.encode import encode
from sft_edu.data.examples import Conversation, Example, Message
from sft_edu.data.jsonl import JsonlError, load_jsonl
from sft_edu.training.train import TrainConfig, Training

USER, ASSISTANT = {"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}
CHAT = (Message("user", "2 + 2 ="), Message("assistant", "4"))
GOOD = b'{"prompt": "a", "response": "b"}\n'


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "mine.jsonl"
        if not isinstance(content, bytes):
            content = "".join(json.dumps(line) + "\n" for line in content).encode()
        path.write_bytes(content)
        return path

    return write


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "a", "response": "b"}, Example("a", "b")),
        ({"completion": "b", "prompt": "a"}, Example("a", "b")),
        ({"prompt": " a\n", "response": "\tb "}, Example(" a\n", "\tb ")),
        ({"prompt": "ä😀\u2028", "response": "<b>"}, Example("ä😀\u2028", "<b>")),
        ({"messages": [USER, ASSISTANT]}, Conversation(CHAT)),
        ({"messages": [USER, ASSISTANT], "prompt": 3}, Conversation(CHAT)),
        (messages(("system", ""), ("user", "a"), ("assistant", "b")), None),
        (messages(("system", "be kind"), ("assistant", "b")), None),
        (messages(("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")), None),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Conversation(CHAT, num_given=1)),
        ({"prompt": [USER], "response": [ASSISTANT]}, Conversation(CHAT, num_given=1)),
        ({"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]}, Conversation((CHAT[1], *CHAT), num_given=2)),
        ({"messages": [USER | {"name": "me"}, ASSISTANT | {"weight": 1}]}, Conversation(CHAT)),
        ({"id": 10**30, "score": float("nan"), "more": [[{}]], "prompt": "a", "response": "b"}, Example("a", "b")),
    ],
)
def test_all_forms_load(write, line, expected):
    turns = tuple(Message(**turn) for turn in line.get("messages", ())) if expected is None else ()
    assert load_jsonl(write([line])) == [expected or Conversation(turns)]


def test_a_byte_order_mark_blank_lines_and_other_line_ends_do_not_matter(write):
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n \t\n\n" + b"  " + GOOD + GOOD.rstrip()
    assert load_jsonl(write(content)) == [Example("a", "b")] * 3


def test_the_path_may_be_a_string(write):
    assert load_jsonl(str(write(GOOD))) == [Example("a", "b")]


def test_integers_of_any_length_are_ignored_like_other_fields(write):
    digits = b"1" * (sys.get_int_max_str_digits() + 1)
    assert load_jsonl(write(b'{"id": -%b, "prompt": "a", "response": "b"}' % digits)) == [Example("a", "b")]


def raw(prompt=b'"a"', response=b'"b"'):
    return b'{"prompt": %b, "response": %b}' % (prompt, response)


# A line that cannot be used, the field that the error names, and what it found.
REFUSED = {
    "cut short": (b'{"prompt": "a", "respo', "", "no JSON (Unterminated string starting at column 17)"),
    "no comma": (b'{"prompt": "a" "response": "b"}', "", "no JSON (Expecting ',' delimiter at column 16)"),
    "trailing comma": (b'{"prompt": "a",}', "", "no JSON (a comma too many at column 15); expected one whole"),
    "trailing comma in a list": (b'{"x": [1 , ], "y": 2}', "", "no JSON (a comma too many at column 10)"),
    "a comma after the object": (raw() + b",", "", "no JSON (a comma too many at column 33)"),
    "cut short after a comma": (b'{"prompt": "a",', "", "no JSON (Expecting property name"),
    "no text after a comma": (b'{"prompt": "a, ]" x}', "", "no JSON (Expecting ',' delimiter at column 19)"),
    "a list over many lines": (
        b"[",
        "",
        "no JSON (Expecting value at column 2); expected one whole JSON object on each line, not a list",
    ),
    "the end of such a list": (b" ]", "", "no JSON (Expecting value at column 2); expected one whole JSON object on"),
    "single quotes": (
        b"{'prompt': 'a'}",
        "",
        "no JSON (Expecting property name enclosed in double quotes at column 2)",
    ),
    "two objects": (b"{}{}", "", "no JSON (Extra data at column 3)"),
    "plain text": ("grüße".encode(), "", "no JSON (Expecting value at column 1)"),
    "pretty printed": (b"{", "", "no JSON ("),
    "a tab in a text": (raw(b'"\t"'), "", "no JSON (Invalid control character at column 13)"),
    "a bad escape": (raw(rb'"\x"'), "", "no JSON (Invalid \\escape"),
    "a byte order mark inside the file": (b"\xef\xbb\xbf" + raw(), "", "no JSON (Expecting value at column 1)"),
    "the line ends of old Macs": (raw() + b"\r" + raw(), "", "no JSON (Extra data at column 34)"),
    "a NUL byte": (raw(b'"a\0"'), "", "a NUL byte at byte 14"),
    "UTF-16": (raw().decode().encode("utf-16-le"), "", "a NUL byte at byte 2"),
    "Latin-1": (raw('"grün"'.encode("latin-1")), "", "the byte 0xfc at byte 15, which is not UTF-8"),
    "gzip": (b"\x1f\x8b\x08", "", "the byte 0x8b at byte 2, which is not UTF-8"),
    "nested lists": (b"[" * 100_000, "", "lists or objects nested too deep"),
    "nested objects": (b'{"a":' * 100_000, "", "lists or objects nested too deep"),
    "nested in another field": (b'{"prompt": ' + b"[" * 100_000, "", "lists or objects nested too deep"),
    "a list": (b"[%b]" % raw(), "", "a list; expected one JSON object on each line"),
    "a text": (b'"a"', "", "text; expected one JSON object"),
    "a number": (b"12", "", "a number; expected one JSON object"),
    "NaN": (b"NaN", "", "nan; expected one JSON object"),
    "null": (b"null", "", "null; expected one JSON object"),
    "true": (b"true", "", "true; expected one JSON object"),
    "no fields": (b"{}", "", 'an object without fields; expected the fields {"prompt", "response"}'),
    "other fields": (b'{"instruction": "a", "output": "b"}', "", "the fields 'instruction', 'output'; expected"),
    "hidden in names": (b'{"\\u001b[2J": 1, "\\ud800": 2}', "", r"the fields '\x1b[2J', '\ud800'; expected"),
    "many fields": (json.dumps(dict.fromkeys("abcdef")).encode(), "", "the fields 'a', 'b', 'c', 'd', 'e', ...; exp"),
    "no response": (b'{"prompt": "a"}', "response", "no such field, only 'prompt'; expected what the prompt"),
    "a misspelt response": (
        b'{"prompt": "a", "respones": "b"}',
        "response",
        "no such field, only 'prompt', 'respones'; expected what",
    ),
    "no prompt": (b'{"response": "b"}', "prompt", "no such field, only 'response'; expected what 'response' answers"),
    "two answers": (b'{"prompt": "", "completion": "", "response": ""}', "completion", "both 'response' and 'co"),
    "an answer beside messages": (b'{"messages": [], "completion": ""}', "messages", "both 'completion' and 'm"),
    "a field twice": (b'{"prompt": "a", "response": "b", "prompt": "c"}', "", "the field 'prompt' twice in one object"),
    "a null prompt": (raw(b"null"), "prompt", "null; expected text"),
    "a number as response": (raw(response=b"5"), "response", "a number; expected text"),
    "a very long number": (raw(response=b"5" * 5000), "response", "inf; expected text"),
    "NaN as response": (raw(response=b"NaN"), "response", "nan; expected text"),
    "false as prompt": (raw(b"false"), "prompt", "false; expected text"),
    "an object as response": (raw(response=b"{}"), "response", "an object; expected text"),
    "an empty prompt": (raw(b'""'), "prompt", "an empty text"),
    "an empty response": (raw(response=b'""'), "response", "an empty text"),
    "an empty completion": (b'{"prompt": "a", "completion": ""}', "completion", "an empty text"),
    "white space": (raw(response=rb'" \n\u00a0"'), "response", "text of white space alone"),
    "half a character": (raw(rb'"a\ud800b"'), "prompt", r"half of a character, \ud800, at position 1"),
    "the other half": (raw(response=rb'"\ude00\ud83d"'), "response", r"half of a character, \ude00, at position 0"),
    "an escaped NUL": (raw(response=rb'"ab\u0000"'), "response", "a NUL character at position 2"),
    "a prompt of turns and a text": ({"prompt": [USER], "response": "b"}, "response", "text; expected a list of messa"),
    "a text and an answer of turns": ({"prompt": "a", "response": [ASSISTANT]}, "prompt", "text; expected a list of"),
    "a completion without an answer": (
        {"prompt": [USER, ASSISTANT], "completion": [USER]},
        "completion",
        "no turn of the assistant among 3",
    ),
    "an empty prompt of turns": (
        {"prompt": [], "completion": [ASSISTANT]},
        "completion[0]",
        "a first turn of the assistant with nothing before it",
    ),
    "a bad turn of a completion": ({"prompt": [USER], "completion": [5]}, "completion[0]", "a number; expected an obj"),
    "messages of no list": ({"messages": "a"}, "messages", "text; expected a list of messages"),
    "null messages": ({"messages": None}, "messages", "null; expected a list of messages"),
    "no messages": (messages(), "messages", "no turn of the assistant among 0"),
    "no answer": (messages(("system", "a"), ("user", "b")), "messages", "no turn of the assistant among 2"),
    "nothing asked": (messages(("assistant", "a")), "messages[0]", "a first turn of the assistant with nothing before"),
    "an empty system message": (
        messages(("system", ""), ("assistant", "a")),
        "messages[1]",
        "a first turn of the assistant with nothing before it",
    ),
    "a turn that is a text": ({"messages": [USER, "4"]}, "messages[1]", 'text; expected an object {"role", "content"}'),
    "a turn of another form": ({"messages": [{"from": "human", "value": "a"}]}, "messages[0].role", "no such field, o"),
    "an empty turn object": ({"messages": [{}]}, "messages[0].role", "no such field; expected an object"),
    "a turn without content": ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "no such field"),
    "an unknown role": (
        messages(("user", "a"), ("tool", "b")),
        "messages[1].role",
        "'tool'; expected one of system, u",
    ),
    "a role with a capital": (messages(("User", "a")), "messages[0].role", "'User'; expected one of system, user, ass"),
    "a role that is a list": (messages((["user"], "a")), "messages[0].role", "a list; expected one of system, user"),
    "an empty turn": (messages(("user", ""), ("assistant", "a")), "messages[0].content", "an empty text"),
    "an empty answer": (
        messages(("user", "a"), ("assistant", " ")),
        "messages[1].content",
        "text of white space alone",
    ),
    "null content": (messages(("user", "a"), ("assistant", None)), "messages[1].content", "null; expected text"),
    "content in parts": (messages(("user", [{"type": "text"}])), "messages[0].content", "a list; expected text"),
    "half a character in a system message": (
        messages(("system", "\udc00"), ("user", "a")),
        "messages[0].content",
        r"half of a character, \udc00, at position 0",
    ),
    "a field of a turn twice": (
        b'{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}',
        "",
        "the field 'role' twice in one object",
    ),
}


@pytest.mark.parametrize(("line", "field", "found"), REFUSED.values(), ids=REFUSED)
def test_a_bad_line_is_named_with_its_field(write, line, field, found):
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    path = write(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(JsonlError) as raised:
        load_jsonl(path)
    error = raised.value
    assert str(error).startswith(f"{path}, line 3{', ' * bool(field)}{field}: got {found}")
    assert "; expected " in str(error)
    assert str(error).isprintable()  # nothing of the file can act on a terminal
    assert len(str(error)) < len(str(path)) + 250
    assert (error.path, error.line, error.field) == (str(path), 3, field)


def test_ten_bad_lines_are_named_at_once_and_no_more_is_read(write, monkeypatch):
    bad = b'{"prompt": "", "response": "b"}\n'
    path = write(GOOD + bad + GOOD + b"{\n")
    with pytest.raises(JsonlError) as raised:
        load_jsonl(path)
    first, second = str(raised.value).splitlines()
    assert first == f"{path}, line 2, prompt: got an empty text; expected text to read"
    assert second.startswith(f"{path}, line 4: got no JSON (")
    assert (raised.value.line, raised.value.field) == (2, "prompt")
    path.write_bytes(bad * 10 + b"{\n" * 1000)
    real = iter(range(10))
    monkeypatch.setattr(jsonl, "_parse", lambda line, parse=jsonl._parse: (next(real), parse(line))[1])
    with pytest.raises(JsonlError) as raised:
        load_jsonl(path)
    *lines, last = str(raised.value).splitlines()
    assert [line.split(", ")[1] for line in lines] == [f"line {number}" for number in range(1, 11)]
    assert last == f"{path}: nothing was read after the first 10 lines that cannot be used"


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"], ids=["nothing", "blank lines", "a mark"])
def test_a_file_without_examples_is_refused(write, content):
    path = write(content)
    with pytest.raises(JsonlError, match=r"mine\.jsonl: got a file without examples; expected lines like") as raised:
        load_jsonl(path)
    assert (raised.value.line, raised.value.field) == (None, "")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        load_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(OSError, match=str(tmp_path)):
        load_jsonl(tmp_path)


def test_a_line_of_10_mb_loads_and_a_longer_one_is_refused_before_it_is_read(write):
    around = len(b'{"prompt": "a", "response": ""}')
    longest = jsonl.MAX_LINE_BYTES - around
    path = write(raw(response=b'"%b"' % (b"b" * longest)) + b"\n" + GOOD)
    assert [len(example.response) for example in load_jsonl(path)] == [longest, 1]
    path.write_bytes(GOOD + raw(response=b'"%b"' % (b"b" * (longest + 1))))
    with pytest.raises(JsonlError, match="line 2: got more than 10,000,000 bytes; expected a shorter line"):
        load_jsonl(path)
    path.write_bytes(b" " * 60_000_000)
    tracemalloc.start()
    with pytest.raises(JsonlError, match=r"line 1: got more than [^\n]*$"):  # the rest of it is no line of its own
        load_jsonl(path)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("part", [b"[],", b"{},", b"0,", b'"",', b"NaN,"], ids=bytes.decode)
def test_the_memory_for_a_hostile_line_is_bounded(write, part, monkeypatch):
    size = 1_000_000
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", size)
    line = b'{"x": [' + part * ((size - 9) // len(part))
    path = write(line[:-1] + b"]}")
    tracemalloc.start()
    with pytest.raises(JsonlError, match="line 1: got the fields 'x'"):
        load_jsonl(path)
    assert tracemalloc.get_traced_memory()[1] < 30 * size
    tracemalloc.stop()


def test_two_fields_among_many_are_found_in_linear_time(write):
    fields = ", ".join(f'"{number}": 0' for number in range(200_000))
    with pytest.raises(JsonlError, match="line 1: got the field '199999' twice"):
        load_jsonl(write(f'{{{fields}, "199999": 0}}'.encode()))


# A hostile file is made of lines that are right and of lines that are nearly right.
GOOD_WORDS = st.sampled_from(["a", " b\n", "é😀", "</s>", "\u2028", "user:\n"])
VALUES = st.sampled_from(
    ["", " ", "\0", "\ud800", "user", "tool", None, True, 0, -1.5, float("nan"), [], {}, [[]], 10**25]
)
KEYS = st.sampled_from(["prompt", "response", "completion", "messages", "id"])


def turns(roles, words):
    return st.lists(st.fixed_dictionaries({"role": roles, "content": words}) | words, max_size=4)


def good_turns(*roles):
    return st.tuples(*(st.fixed_dictionaries({"role": st.just(role), "content": GOOD_WORDS}) for role in roles))


RIGHT = st.one_of(
    st.fixed_dictionaries({"prompt": GOOD_WORDS, "response": GOOD_WORDS}, optional={"id": VALUES}),
    st.fixed_dictionaries({"messages": good_turns("system", "user", "assistant", "user", "assistant")}),
    st.fixed_dictionaries({"prompt": good_turns("assistant", "user"), "completion": good_turns("assistant", "user")}),
)
NEARLY_RIGHT = st.one_of(
    st.dictionaries(KEYS, GOOD_WORDS | VALUES, max_size=4),
    st.fixed_dictionaries({"messages": turns(st.sampled_from(["user", "assistant"]) | VALUES, GOOD_WORDS | VALUES)}),
    st.fixed_dictionaries({"prompt": turns(VALUES, GOOD_WORDS), "completion": good_turns("user", "assistant")}),
)


@st.composite
def files(draw):
    """Mostly JSON, of lines that are nearly right; some bytes may be replaced or cut."""
    lines = draw(st.lists(draw(st.sampled_from([RIGHT, RIGHT | NEARLY_RIGHT])), min_size=1, max_size=3))
    content = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(
        json.dumps(line, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass") for line in lines
    )
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(max_size=3)) + content[place + draw(st.integers(0, 3)) :]
    return content


fuzz = settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])


def load_or_refuse(path, content):
    path.write_bytes(content)
    try:
        return load_jsonl(path)
    except JsonlError as refusal:
        error = str(refusal)
    assert error.startswith(str(path))
    assert ": got " in error
    assert "; expected " in error
    assert all(line.isprintable() for line in error.splitlines())
    assert len(error.splitlines()) <= jsonl.MOST_PROBLEMS + 1
    return []


@fuzz
@given(content=files())
def test_any_file_loads_into_something_that_encodes_or_is_refused_in_words(tmp_path_factory, content):
    examples = load_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.jsonl", content)
    event("loaded" if examples else "refused")
    for example in examples:
        texts = example if isinstance(example, Example) else [text for turn in example.messages for text in turn]
        assert all(type(text) is str for text in texts)
    if examples:
        for encoded in encode(examples, ByteTokenizer(), max_length=12):
            assert len(encoded.input_ids) <= 12
            assert (encoded.is_response[0], encoded.is_response[-1]) == (False, True)


@fuzz
@given(content=st.binary(max_size=40) | st.text(alphabet='{}[]":,\\u0\nNa ', max_size=30).map(str.encode))
def test_random_bytes_are_never_a_crash(tmp_path_factory, content):
    load_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.jsonl", content)


def test_whatever_loads_trains_one_step(write):
    lines = [
        {"prompt": "a", "response": "b"},
        {"prompt": "x" * 300, "completion": "</s>😀" * 100},
        {"messages": [USER, ASSISTANT, USER, ASSISTANT, USER]},
        messages(("system", "be"), ("assistant", "b")),
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
    ]
    tokenizer, model = ByteTokenizer(), TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=64)
    encoded = encode(load_jsonl(write(lines)), tokenizer, max_length=65)
    config = TrainConfig(microbatch_size=2, gradient_accumulation_steps=3)
    (record,) = Training(model, encoded, config, pad_token_id=tokenizer.pad_token_id)
    assert record.num_tokens == sum(sum(one.is_response) for one in encoded)
    assert 0 < record.nll < 50
