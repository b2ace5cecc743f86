"""From text to ids, shifted labels and the mask, with bytes and with a Hugging Face tokenizer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sft_edu import ByteTokenizer, tokenize_prompt_and_output, visible_token

BYTES = ByteTokenizer()
SURROGATES = st.characters(categories=["Cs"])


@settings(deadline=None, derandomize=True, database=None)
@given(st.text())
def test_bytes_come_back_as_the_text_they_were(text):
    assert BYTES.decode(BYTES.encode(text, add_special_tokens=False)) == text
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BYTES.encode(text) == [BYTES.bos_token_id, *BYTES.encode(text, add_special_tokens=False), BYTES.eos_token_id]


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(), SURROGATES, st.text())
def test_half_a_character_is_encoded_and_comes_back_as_something_that_can_be_shown(before, half, after):
    ids = BYTES.encode(before + half + after, add_special_tokens=False)
    assert max(ids) < 256 < len(BYTES)
    shown = BYTES.decode(ids)
    assert shown.startswith(before)
    assert shown.endswith(after)
    assert "\ufffd" in shown
    shown.encode("utf-8")  # raises where a lone surrogate is left


def test_labels_are_the_next_inputs_and_the_mask_lies_on_the_labels():
    batch = tokenize_prompt_and_output(["ab", ""], ["cde", "xy"], BYTES)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "response_mask": torch.bool,
    }
    a, b, c, d, e, x, y, pad = *b"abcdexy", BYTES.pad_token_id
    assert batch["input_ids"].tolist() == [[a, b, c, d], [x, y, pad, pad]]
    assert batch["labels"].tolist() == [[b, c, d, e], [y, pad, pad, pad]]
    assert batch["response_mask"].tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]  # x has nothing to be predicted from


texts = st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=5)


@settings(deadline=None, derandomize=True, database=None)
@given(texts, st.booleans())
def test_the_labels_under_the_mask_are_the_output(pairs, append_eos):
    prompts, outputs = zip(*[("p" + prompt, "o" + output) for prompt, output in pairs], strict=True)
    batch = tokenize_prompt_and_output(prompts, outputs, BYTES, append_eos=append_eos)
    end = [BYTES.eos_token_id] if append_eos else []
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ids, labels, mask = (batch[name][row] for name in ("input_ids", "labels", "response_mask"))
        expected = BYTES.encode(output, add_special_tokens=False) + end
        assert labels[mask].tolist() == expected
        assert torch.equal(ids[1:], labels[:-1])
        read = len(prompt.encode()) + len(expected)
        assert (labels[read - 1 :] == BYTES.pad_token_id).all()
        assert mask.sum() == len(expected)


def test_an_output_without_a_token_has_an_empty_mask_until_eos_is_appended():
    for append_eos, tokens in ((False, 0), (True, 1)):
        batch = tokenize_prompt_and_output(["ab"], [""], BYTES, append_eos=append_eos)
        assert batch["response_mask"].sum() == tokens
    assert batch["labels"][batch["response_mask"]].tolist() == [BYTES.eos_token_id]


class NoEos(ByteTokenizer):
    eos_token_id = None


@pytest.mark.parametrize(
    ("prompts", "outputs", "options", "error", "text"),
    [
        ("ab", ["c"], {}, TypeError, "prompts: got str 'ab'; expected a list of strings"),
        (["a"], [b"c"], {}, TypeError, r"outputs: got list \[b'c'\]; expected a list of strings"),
        (None, ["c"], {}, TypeError, "prompts: got NoneType None; expected a list of strings"),
        (["a"], iter(["c"]), {}, TypeError, "outputs: got list_iterator .*; expected a list of strings"),
        (["a", "b"], ["c"], {}, ValueError, "prompts and outputs: got 2 and 1 strings; expected one output for each"),
        ([], [], {}, ValueError, "prompts and outputs: got 0 and 0 strings; expected .* at least one"),
        (["", "a"], ["b", ""], {}, ValueError, "prompts and outputs: got no pair with two tokens; expected"),
        (["a"], ["b"], {"append_eos": True}, ValueError, "append_eos: got True; expected False"),
    ],
)
def test_texts_that_cannot_be_paired_are_refused(prompts, outputs, options, error, text):
    with pytest.raises(error, match=f"^{text}"):
        tokenize_prompt_and_output(prompts, outputs, NoEos(), **options)


@pytest.fixture(params=[True, False], ids=["with a pad token", "without a pad token"])
def hugging_face(request):
    """A real tokenizer, trained here: words, a bos before every text, and perhaps a token to pad with."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    sentences = ["the cat sat on the mat", "a dog sat on a log", "the dog and the cat"]
    tokenizer.train_from_iterator(sentences, trainers.WordLevelTrainer(special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    pad = {"pad_token": "<pad>"} if request.param else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **pad)


def test_a_hugging_face_tokenizer_gives_the_same_shift_and_mask(hugging_face):
    prompts, outputs = ["the cat", "a dog sat on"], ["sat on the mat", "a log"]
    batch = tokenize_prompt_and_output(prompts, outputs, hugging_face, append_eos=True)
    assert batch["labels"].shape == (2, 6)
    for row, output in enumerate(outputs):
        response = batch["labels"][row][batch["response_mask"][row]]
        assert hugging_face.decode(response) == f"{output} </s>"
    assert batch["response_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert 1 not in batch["input_ids"]  # no bos between prompt and output


def test_padding_is_pad_or_else_eos_and_never_counts(hugging_face):
    batch = tokenize_prompt_and_output(["the cat", "a"], ["sat on", "dog"], hugging_face)
    expected = hugging_face.eos_token_id if hugging_face.pad_token_id is None else hugging_face.pad_token_id
    assert batch["labels"][1, 1:].tolist() == [expected, expected]
    assert batch["response_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_without_pad_and_eos_the_padding_is_0():
    class Bare(NoEos):
        pad_token_id = None

    batch = tokenize_prompt_and_output(["a", "a"], ["b", "bc"], Bare())
    assert batch["labels"][0].tolist() == [ord("b"), 0]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        *((ord(c), c) for c in "aZ0<>&"),
        *((ord(" "), "␣"), (ord("\n"), "⏎"), (ord("\t"), "⇥"), (ord("\r"), "␍")),
        *((0, "x00"), (0x1B, "x1b"), (0xC3, "xc3"), (0xFF, "xff")),
        *((BYTES.eos_token_id, "<eos>"), (BYTES.pad_token_id, "<pad>"), (torch.tensor(ord("a")), "a")),
    ],
)
def test_every_token_has_something_to_see(token, shown):
    assert visible_token(token, BYTES) == shown


def test_no_token_is_shown_with_anything_invisible_in_it(hugging_face):
    for tokenizer in (BYTES, hugging_face):
        shown = [visible_token(token, tokenizer) for token in range(len(tokenizer))]
        assert all(text and text.isprintable() and not text.isspace() for text in shown)
    assert "cat" in shown


def test_writing_to_the_labels_leaves_the_inputs_alone():
    batch = tokenize_prompt_and_output(["ab", "c"], ["de", "f"], ByteTokenizer())
    inputs = batch["input_ids"].clone()
    batch["labels"][~batch["response_mask"]] = -100
    assert batch["input_ids"].equal(inputs)
    assert all(tensor.is_contiguous() for tensor in batch.values())


def test_special_tokens_have_names():
    tokenizer = ByteTokenizer()
    assert [visible_token(token, tokenizer) for token in (256, 257, 258)] == ["<pad>", "<bos>", "<eos>"]
    tokenizer.pad_token_id = tokenizer.eos_token_id
    assert visible_token(258, tokenizer) == "<eos>"
