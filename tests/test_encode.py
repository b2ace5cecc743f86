"""What is trained on, read back token by token: plain text, chat templates, and examples that are too long."""

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_edu import ByteTokenizer, TinyLM, tokenize_prompt_and_output
from sft_edu.data.encode import Encoded, EncodedExamples, collate, encode, padding_token
from sft_edu.data.examples import Conversation, Example, Message
from sft_edu.training.train import TrainConfig, Training

BYTES = ByteTokenizer()
TALK = Conversation(
    (
        Message("system", "be brief"),
        Message("user", "the cat"),
        Message("assistant", "sat on"),
        Message("user", "2 + 2"),
        Message("assistant", "4 >"),
        Message("user", "bye"),
    )
)
PAIR = Conversation((Message("user", "2 + 2"), Message("assistant", "4")))

LOOP = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = LOOP.replace("%s", "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n")
MARKED = LOOP.replace(
    "%s",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{%- generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
BRACKETS = (  # nothing to add before an answer
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
WORDS = (  # no special token anywhere
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


MERGES = [("Ċ", "Ċ"), ("Ġ", "c"), ("t", "h"), ("th", "e")]  # two new lines, " c", "th", "the"


def hugging_face(template=None, kind=PreTrainedTokenizerFast):
    """A real tokenizer: bytes, of which a few are joined wherever they meet."""
    pieces = ["<|im_start|>", "<|im_end|>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = kind(tokenizer_object=tokenizer, eos_token="</s>", additional_special_tokens=pieces[:2])
    wrapped.chat_template = template
    return wrapped


def text_of(ids, tokenizer):
    """All tokens as text, special ones too."""
    if isinstance(tokenizer, ByteTokenizer):
        return "".join("<eos>" if token == tokenizer.eos_token_id else tokenizer.decode([token]) for token in ids)
    return tokenizer.decode(ids)


def read(encoded, tokenizer):
    """The text in runs: those of the prompt and, in a list of their own, those of responses."""
    pairs = zip(encoded.input_ids, encoded.is_response, strict=True)
    runs = [(is_response, [token for token, _ in run]) for is_response, run in groupby(pairs, key=lambda pair: pair[1])]
    return tuple([text_of(ids, tokenizer) for kind, ids in runs if kind == wanted] for wanted in (False, True))


# --- plain text ---


def test_a_prompt_and_its_response_are_tokenized_apart_and_end_with_eos():
    (one,) = encode([Example("ab", "cd")], BYTES)
    assert one == Encoded((*b"abcd", BYTES.eos_token_id), (False, False, True, True, True))
    tokenizer = hugging_face()
    for example in (Example("the ", "cat"), Example("a\n", "\nb")):  # joined, their tokens would be others
        (one,) = encode([example], tokenizer)
        apart = [tokenizer.encode(text, add_special_tokens=False) for text in example]
        assert list(one.input_ids) == [*apart[0], *apart[1], tokenizer.eos_token_id]
        assert tokenizer.encode("".join(example), add_special_tokens=False) != apart[0] + apart[1]


def test_a_microbatch_is_what_tokenize_prompt_and_output_makes_of_the_texts():
    examples = [Example("the cat", "sat"), Example("2", "+ 2 is 4"), Example("a\n", "😀")]
    for tokenizer in (BYTES, hugging_face()):
        made = collate(encode(examples, tokenizer), padding_token(tokenizer))
        prompts, outputs = zip(*examples, strict=True)
        expected = tokenize_prompt_and_output(prompts, outputs, tokenizer, append_eos=True)
        assert all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tokenizer", [BYTES, hugging_face()], ids=["bytes", "Hugging Face"])
def test_a_conversation_without_a_template_is_plain_text(tokenizer):
    (one,) = encode([TALK], tokenizer)
    end = "<eos>" if tokenizer is BYTES else "</s>"
    prompts, responses = read(one, tokenizer)
    assert prompts == ["system:\nbe brief\nuser:\nthe cat\nassistant:\n", "\nuser:\n2 + 2\nassistant:\n"]
    assert responses == [f"sat on{end}", f"4 >{end}"]


def test_turns_that_are_given_are_context():
    (one,) = encode([TALK._replace(num_given=3)], BYTES)
    prompts, responses = read(one, BYTES)
    assert prompts == ["system:\nbe brief\nuser:\nthe cat\nassistant:\nsat on<eos>\nuser:\n2 + 2\nassistant:\n"]
    assert responses == ["4 ><eos>"]


def test_what_has_a_form_of_its_own_stays_out_of_the_template():
    tokenizer = hugging_face(CHATML)
    assert encode([Example("2", "4"), TALK], tokenizer, chat_template=False) == encode(
        [Example("2", "4"), TALK], hugging_face()
    )


# --- chat templates ---


class Slow(PreTrainedTokenizerFast):
    """One that cannot tell which characters a token stands for, as those written in Python cannot."""

    is_fast = False

    def apply_chat_template(self, turns, **options):
        assert "return_assistant_tokens_mask" not in options
        return super().apply_chat_template(turns, **options)


TEMPLATES = {
    "by prefixes": (hugging_face(CHATML), "{}<|im_end|>"),
    "by marks": (hugging_face(MARKED), "{}<|im_end|>"),
    "by marks, without the end": (hugging_face(MARKED_WITHOUT_END), "{}<|im_end|>"),
    "marks that cannot be read": (hugging_face(MARKED, Slow), "{}<|im_end|>"),
    "no generation prompt": (hugging_face(BRACKETS), " {}</s>"),
    "no special tokens": (hugging_face(WORDS), "{}\n"),
    "one of several": (hugging_face({"default": CHATML, "tool_use": WORDS}), "{}<|im_end|>"),
}


@pytest.mark.parametrize(("tokenizer", "answer"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_answers_of_a_template_are_texts_and_end_marks(tokenizer, answer):
    for num_given, answers in ((0, ["sat on", "4 >"]), (3, ["4 >"])):
        (one,) = encode([TALK._replace(num_given=num_given)], tokenizer)
        assert read(one, tokenizer)[1] == [answer.format(text) for text in answers]
        # Nothing but what the template renders, and all of it up to the last answer.
        turns = [message._asdict() for message in TALK.messages]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        assert rendered.startswith(text_of(one.input_ids, tokenizer))


@pytest.mark.parametrize(("tokenizer", "answer"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_tokens_before_an_answer_are_those_that_a_model_is_asked_with(tokenizer, answer):
    (one,) = encode([PAIR], tokenizer)
    turns = [message._asdict() for message in PAIR.messages]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    start = one.is_response.index(True)
    assert list(one.input_ids[:start]) == tokenizer.encode(asked, add_special_tokens=False)
    assert text_of(one.input_ids[start:], tokenizer) == answer.format("4")
    assert encode([Example("2 + 2", "4")], tokenizer)[0] == one


letters = st.text(alphabet="ab >\n\t{%}é😀", max_size=10).map(lambda text: f"a{text}b")


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.lists(st.tuples(letters, letters), min_size=1, max_size=3), st.integers(0, 2))
def test_both_ways_of_finding_answers_agree_on_any_text(pairs, num_given):
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    num_given = min(2 * num_given, 2 * len(pairs) - 2)
    conversation = Conversation(tuple(turns), num_given)
    expected = [f"{answer}<|im_end|>" for _, answer in pairs[num_given // 2 :]]
    by_prefixes, by_marks, open_marks = (TEMPLATES[name][0] for name in list(TEMPLATES)[:3])
    assert read(encode([conversation], by_prefixes)[0], by_prefixes)[1] == expected
    assert encode([conversation], by_prefixes)[0] == encode([conversation], by_marks)[0]
    assert encode([conversation], by_prefixes)[0] == encode([conversation], open_marks)[0]


FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '...' }}")
REFUSED = {
    "the prompt's header is in the answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
        "got a chat template that ignores add_generation_prompt; expected one that heeds it",
    ),
    "earlier answers change": (
        FORGETFUL,
        "got a chat template that changes the text up to turn 2 once that or a later",
    ),
    "no end": (CHATML.replace("<|im_end|>\n", ""), "got a chat template that ends an answer without a token; expected"),
    "no end where marked": (
        MARKED_WITHOUT_END.replace("<|im_end|>", "").replace("{{ '\n' }}", " "),
        "got a chat template that ends an answer without a token; expected an end mark, such as eos",
    ),
    "no end behind more than the text": (
        CHATML.replace("{{ m.content }}<|im_end|>\n", "{{ 'so ' if m.role == 'assistant' else '' }}{{ m.content }}"),
        "got a chat template that ends an answer without a token; expected an end mark, such as eos",
    ),
    "the text is left out": (
        CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"),
        "got a chat template that leaves out or changes the text of turn 2; expected one that keeps all but white",
    ),
    "the marked text is changed": (
        MARKED.replace("generation %}{{ m.content }}", "generation %}{{ m.content | length }}"),
        "got a chat template that leaves out or changes the text of turn 2; expected one that keeps all but white",
    ),
    "no mark in between": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "got a chat template that marks 1 answers of 2; expected each marked apart",
    ),
    "its own refusal": (
        "{{ raise_exception('roles must alternate') }}",
        "got an error from the tokenizer or its chat template, roles must alternate; expected turns that it can render",
    ),
    "a mistake in it": (
        "{% for m in messages %}",
        "got an error from the tokenizer or its chat template, Unexpected end",
    ),
}


@pytest.mark.parametrize(("template", "text"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_hides_its_answers_is_refused(template, text):
    with pytest.raises(ValueError, match=r"^examples\[0\]: ") as raised:
        encode([Conversation(PAIR.messages * 2)], hugging_face(template))
    assert str(raised.value).startswith(f"examples[0]: {text}")


def test_a_special_token_inside_an_answer_does_not_end_it():
    for template, end in ((WORDS, "\n"), (CHATML, "<|im_end|>")):
        tokenizer = hugging_face(template)
        assert read(encode([Example("a", "b</s>c")], tokenizer)[0], tokenizer)[1] == [f"b</s>c{end}"]


def test_turns_after_the_last_answer_are_not_even_rendered():
    followed = Conversation((*PAIR.messages, Message("user", "bye")))
    assert encode([followed], hugging_face(FORGETFUL)) == encode([PAIR], hugging_face(CHATML))


def test_white_space_of_the_answer_is_no_end_mark_but_that_of_the_template_is():
    without_end = hugging_face(CHATML.replace("<|im_end|>\n", ""))
    with pytest.raises(ValueError, match="ends an answer without a token"):
        encode([Example("a", " b ")], without_end)
    assert read(encode([Example("a", " b\n")], hugging_face(WORDS))[0], hugging_face())[1] == [" b\n\n"]


def test_an_answer_that_grows_together_with_the_text_before_it_is_refused():
    example = Example("a", "\nb")  # the new line before it and its own are one token
    with pytest.raises(ValueError, match=r"^examples\[0\]: got a token that joins the answer in turn 2 to the text"):
        encode([example], hugging_face(CHATML))
    (one,) = encode([example], hugging_face(CHATML), chat_template=False)
    assert read(one, hugging_face())[1] == ["\nb</s>"]


def small_tokenizer(template=None):
    """One that knows a few letters, and drops white space and all other characters."""
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "c": 1, "a": 2, "t": 3, "s": 4}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


def test_an_end_mark_that_the_tokenizer_drops_is_missed():
    (one,) = encode([Example("tt", "cat")], small_tokenizer(BRACKETS))
    assert one == Encoded((3, 3, 1, 2, 3, 0), (False, False, True, True, True, True))
    with pytest.raises(ValueError, match="ends an answer without a token"):
        encode([Example("tt", "cat")], small_tokenizer(WORDS))


@pytest.mark.parametrize(
    ("example", "field"),
    [
        (Example("dog", "cat"), "prompt"),
        (Example("cat", "dog"), "response"),
        (Conversation((Message("user", "cat"), Message("assistant", "dog"))), r"messages\[1\]\.content"),
    ],
)
def test_a_text_of_which_no_token_is_made_is_refused(example, field):
    with pytest.raises(ValueError, match=rf"^examples\[0\]\.{field}: got text of which the tokenizer makes no token"):
        encode([example], small_tokenizer())


@pytest.mark.parametrize("template", [BRACKETS, MARKED], ids=["by prefixes", "by marks"])
def test_an_answer_of_which_no_token_is_made_is_refused_under_a_template_too(template):
    tokenizer = small_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(ValueError, match=r"^examples\[0\]\.response: got text of which the tokenizer makes no token"):
        encode([Example("cat", "dog")], tokenizer)
    with pytest.raises(ValueError, match=r"^examples\[0\]\.messages\[1\]\.content: got text of which the tokenizer"):
        encode([Conversation((Message("user", "cat"), Message("assistant", "dog")))], tokenizer)


@pytest.mark.parametrize("template", [None, BRACKETS, MARKED], ids=["plain", "by prefixes", "by marks"])
def test_an_error_of_the_tokenizer_names_the_example(template):
    tokenizer = Tokenizer(models.WordLevel({"cat": 0, "</s>": 1}, unk_token=None))  # raises at any other word
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.chat_template = template
    with pytest.raises(
        ValueError, match=r"^examples\[0\]: got an error from the tokenizer.*Missing \[UNK\].*; expected "
    ):
        encode([Example("cat", "dog")], wrapped)


def test_a_template_whose_answer_has_nothing_before_it_is_refused():
    template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(ValueError, match=r"^examples\[0\]: got a response without a token before it; expected one"):
        encode([Example("the", "cat")], hugging_face(template))


# --- too long ---

short_texts = st.text(alphabet="abé", min_size=1, max_size=12)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.builds(Example, short_texts, short_texts), min_size=1, max_size=4), st.integers(3, 30))
def test_the_oldest_tokens_of_the_prompt_go_first(examples, max_length):
    encoded = encode(examples, BYTES, max_length)
    truncated = cut = 0
    for (prompt, response), (ids, is_response) in zip(examples, encoded, strict=True):
        prompt, response = prompt.encode(), response.encode()
        kept = min(len(response), max_length - 2)
        before = min(len(prompt), max_length - kept - 1)
        assert ids == (*prompt[len(prompt) - before :], *response[:kept], BYTES.eos_token_id)
        assert is_response == (False,) * before + (True,) * (kept + 1)
        assert before >= 1
        truncated += len(ids) < len(prompt) + len(response) + 1
        cut += kept < len(response)
    assert (encoded.truncated, encoded.cut_responses) == (truncated, cut)
    if not truncated:
        assert encoded.sequences == encode(examples, BYTES).sequences


def test_a_cut_answer_is_context_for_the_next():
    (whole,) = encode([TALK], BYTES)
    text, (first, second) = text_of(whole.input_ids, BYTES), read(whole, BYTES)[1]
    for max_length in range(5, len(whole.input_ids) + 1):
        encoded = encode([TALK], BYTES, max_length)
        (one,) = encoded
        dropped = len(whole.input_ids) - max_length
        has_first = dropped < whole.is_response.index(True)
        assert one.input_ids == whole.input_ids[dropped:]
        assert text.endswith(text_of(one.input_ids, BYTES))
        assert not one.is_response[0]
        assert read(one, BYTES)[1] == [first] * has_first + [second]
        assert (encoded.truncated, encoded.cut_responses) == (dropped > 0, not has_first)
    for max_length, expected in ((4, "\n4 <eos>"), (3, "\n4<eos>")):
        (one,) = encode([TALK], BYTES, max_length)
        assert text_of(one.input_ids, BYTES) == expected
        assert one.is_response == (False,) + (True,) * (max_length - 1)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("max_length", [3, 4, 6, 9])
def test_however_short_an_answer_gets_its_end_mark_stays(name, max_length):
    tokenizer, _ = TEMPLATES[name]
    long = Conversation((Message("user", "the cat"), Message("assistant", "b a " * 40)))
    (whole,), encoded = encode([long], tokenizer), encode([long], tokenizer, max_length)
    (one,) = encoded
    start = whole.is_response.index(True)
    assert one.input_ids == (*whole.input_ids[start - 1 : start + max_length - 2], whole.input_ids[-1])
    assert one.is_response == (False,) + (True,) * (max_length - 1)
    assert (encoded.truncated, encoded.cut_responses) == (1, 1)


def test_an_end_mark_of_several_tokens_stays_whole():
    tokenizer = hugging_face(
        MARKED.replace("{% endgeneration %}", "\nb{{ ' ' }}{% endgeneration %}").replace("b{", "{")
    )
    (one,) = encode([Example("a", "the cat sat on the mat")], tokenizer, max_length=6)
    assert read(one, tokenizer)[1][0].endswith("<|im_end|>\n ")
    (one,) = encode([Example("a", "the cat sat on the mat")], tokenizer, max_length=3)
    assert "<|im_end|>" in read(one, tokenizer)[1][0]


# --- what comes out ---


def test_the_result_says_in_a_sentence_what_was_cut():
    examples = [Example("ab", "c"), Example("abcdef", "c"), Example("a", "bcdefgh")]
    assert str(encode(examples, BYTES)) == "3 examples, 21 tokens, 12 of them in responses."
    assert str(encode(examples, BYTES, 5)) == (
        "3 examples, 14 tokens, 8 of them in responses. Cut to 5 tokens: 2 examples; response tokens were lost in 1."
    )
    assert repr(encode(examples, BYTES, 5)) == "EncodedExamples(max_length=5, truncated=2, cut_responses=1)"


def test_the_result_is_a_sequence():
    encoded = encode([Example("a", "b"), Example("c", "d")], BYTES)
    assert isinstance(encoded, EncodedExamples)
    assert len(encoded) == 2
    assert [encoded[torch.tensor(1)], encoded[0]] == [*reversed(list(encoded))]


def test_padding_is_pad_or_else_eos_or_else_0():
    tokenizer = ByteTokenizer()
    assert padding_token(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token_id = None
    assert padding_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token_id = None
    assert padding_token(tokenizer) == 0


def test_collate_pads_on_the_right_and_shifts_the_labels():
    batch = collate([Encoded((1, 2, 3), (False, True, True)), Encoded((4,), (True,))], pad_token_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2], [4, 9]],
        "labels": [[2, 3], [9, 9]],
        "response_mask": [[True, True], [False, False]],
    }


@pytest.mark.parametrize("tokenizer", [BYTES, *(TEMPLATES[name][0] for name in ("by prefixes", "by marks"))])
def test_a_model_trains_on_all_of_it(tokenizer):
    examples = [Example("2 + 2", "4"), TALK, TALK._replace(num_given=3), PAIR]
    encoded = encode(examples, tokenizer, max_length=33)
    model = TinyLM(len(tokenizer), d_model=16, num_layers=1, num_heads=2, context_length=32)
    config = TrainConfig(microbatch_size=2, gradient_accumulation_steps=2)
    (record,) = Training(model, encoded, config, pad_token_id=padding_token(tokenizer))
    assert record.num_tokens == sum(sum(one.is_response) for one in encoded)
    assert 0 < record.nll < 50


# --- bad input ---


class NoEos(ByteTokenizer):
    eos_token_id = None


GOOD = [Example("a", "b")]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((None, BYTES), TypeError, "examples: got NoneType; expected a list of Example and Conversation"),
        (("ab", BYTES), TypeError, "examples: got str; expected a list"),
        ((iter(GOOD), BYTES), TypeError, "examples: got list_iterator; expected a list"),
        ((GOOD[0], BYTES), TypeError, "examples: got Example; expected a list"),
        ((PAIR, BYTES), TypeError, "examples: got Conversation; expected a list"),
        (([("a", "b")], BYTES), TypeError, "examples[0]: got tuple; expected an Example or a Conversation"),
        (([*GOOD, {"prompt": "a"}], BYTES), TypeError, "examples[1]: got dict; expected an Example or"),
        (([], BYTES), ValueError, "examples: got none; expected at least one"),
        ((GOOD, None), TypeError, "tokenizer: got NoneType; expected a Tokenizer"),
        ((GOOD, NoEos()), ValueError, "tokenizer: got one without an eos token; expected one"),
        ((GOOD, BYTES, 2), ValueError, "max_length: got 2; expected None or an integer of at least 3"),
        ((GOOD, BYTES, True), ValueError, "max_length: got True; expected None or"),
        ((GOOD, BYTES, 8.0), ValueError, "max_length: got 8.0; expected None or"),
        (
            ([*GOOD, Example("", "b")], BYTES),
            ValueError,
            "examples[1].prompt: got an empty text; expected text to read",
        ),
        (([Example("a", " \n")], BYTES), ValueError, "examples[0].response: got text of white space alone; expected"),
        (([Example("a", None)], BYTES), ValueError, "examples[0].response: got null; expected text"),
        (([Example("a", b"b")], BYTES), ValueError, "examples[0].response: got bytes; expected text"),
        (([Example("a\ud800", "b")], BYTES), ValueError, "examples[0].prompt: got half of a character, \\ud800, at"),
        (([Conversation(None)], BYTES), ValueError, "examples[0].messages: got null; expected a tuple of messages"),
        (([Conversation(())], BYTES), ValueError, "examples[0].messages: got no turn of the assistant among 0; exp"),
        (([Conversation(({"role": "user"},))], BYTES), ValueError, "examples[0].messages[0]: got an object; expected"),
        (([PAIR._replace(num_given=2)], BYTES), ValueError, "examples[0].messages: got no turn of the assistant among"),
        (([PAIR._replace(num_given=-1)], BYTES), ValueError, "examples[0].num_given: got -1; expected a count"),
        (([PAIR._replace(num_given="1")], BYTES), ValueError, "examples[0].num_given: got '1'; expected a count"),
        (([Conversation(PAIR.messages[1:])], BYTES), ValueError, "examples[0].messages[0]: got a first turn of the"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error) as raised:
        encode(*arguments)
    assert str(raised.value).startswith(text)
    assert "; expected " in str(raised.value)
