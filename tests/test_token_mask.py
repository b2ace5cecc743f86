"""TokenMask as the kernel sees it: what it takes, what it refuses, what it sends."""

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
import traitlets

from sft_edu.widgets import TokenMask
from sft_edu.widgets.page import page_text

TOKENS = [["␣", "L", "i", "<eos>"], ["?", "4", "<eos>", "<pad>"]]
MASK = [[0, 1, 1, 1], [0, 1, 1, 0]]
VALUES = [[0.0, -0.25, -0.25, -0.25], [0.0, -0.25, 0.5, 0.0]]


@pytest.fixture
def widget():
    widget = TokenMask(TOKENS, MASK, values=VALUES, value_name="gradient")
    yield widget
    widget.close()


def state(widget):
    return json.dumps(widget.get_state(["tokens", "mask", "labels", "values", "value_name", "notes"]))


def hand(widget, text):
    """What a page does when a mask is painted."""
    widget.set_state({"mask": text})


def messages(widget, monkeypatch):
    sent = []
    monkeypatch.setattr(widget, "_send", lambda message, buffers=None: sent.append(message))
    return sent


def test_roles_come_from_the_mask_and_the_tokens(widget):
    assert widget.labels == (("prompt", "response", "response", "eos"), ("prompt", "response", "eos", "padding"))


def test_a_sequence_padded_with_eos_ends_once():
    widget = TokenMask([["a", "<eos>", "<eos>"]], [[1, 1, 0]])
    assert widget.labels == (("response", "eos", "padding"),)


def test_a_sequence_without_a_response_is_not_all_padding():
    widget = TokenMask([["a", "b", "<pad>"]], [[0, 0, 0]])
    assert widget.labels == (("prompt", "prompt", "padding"),)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, lambda rows: [tuple(map(bool, row)) for row in rows]])
def test_tensors_arrays_and_lists_are_the_same_mask(make):
    widget = TokenMask(TOKENS, make(MASK), values=make(VALUES) if make in (torch.tensor, np.array) else VALUES)
    assert widget.mask == ((0, 1, 1, 1), (0, 1, 1, 0))
    assert all(type(bit) is int for row in widget.mask for bit in row)
    assert widget.values[1] == (0.0, -0.25, 0.5, 0.0)


def test_nobody_changes_the_widget_through_the_list_it_was_given():
    mask = [row[:] for row in MASK]
    widget = TokenMask(TOKENS, mask)
    mask[0][0] = 1
    assert widget.mask[0][0] == 0


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("mask", [[1, 1], [0, 1]], r"mask: got 2 rows of 2; expected 2 rows of 4, as in tokens \(show\(\) sets"),
        ("mask", [[1, 1, 1, 1]], "mask: got 1 rows of 4; expected 2 rows of 4"),
        ("mask", [[1, 1, 1, 1], [1]], "mask: got rows of length 4, 1; expected rows of one length"),
        ("mask", [], "mask: got rows of length none; expected rows of one length, at least 1"),
        ("mask", [[], []], "mask: got rows of length 0, 0; expected"),
        ("mask", None, "mask: got None; expected rows of 0 or 1"),
        ("mask", 1, "mask: got 1; expected rows of 0 or 1"),
        ("mask", ["1101", "1111"], "mask: got .* expected rows of 0 or 1"),
        ("mask", [[1, 1, 2, 1], [1, 1, 1, 1]], "mask: got 2 for token 2 of sequence 0; expected 0 or 1"),
        ("mask", [[1, 1, 0.5, 1], [1, 1, 1, 1]], "mask: got 0.5 for token 2 of sequence 0"),
        ("mask", [[1, 1, float("nan"), 1], [1, 1, 1, 1]], "mask: got nan for token 2"),
        ("mask", torch.ones(2, 3), "mask: got 2 rows of 3; expected 2 rows of 4"),
        ("tokens", [["a"]], "tokens: got 1 rows of 1; expected 2 rows of 4, as in mask"),
        ("tokens", [["a", "b", "c", 4], ["a"] * 4], "tokens: got 4 for token 3 of sequence 0; expected a text"),
        ("tokens", ["abcd", "efgh"], "tokens: got .* expected rows of a text"),
        ("labels", [["prompt"] * 4] * 3, "labels: got 3 rows of 4; expected 2 rows of 4"),
        ("labels", [["prompt"] * 4, ["answer"] * 4], "labels: got 'answer' for token 0 of sequence 1; expected one of"),
        ("values", [[0.0] * 4], "values: got 1 rows of 4; expected 2 rows of 4"),
        ("values", [["0"] * 4] * 2, "values: got '0' for token 0 of sequence 0; expected a number"),
        ("values", [[10**400] * 4] * 2, "values: got 1000.* expected a number"),
        ("notes", [["a"] * 3] * 2, "notes: got 2 rows of 3; expected 2 rows of 4"),
        ("notes", [[None] * 4] * 2, "notes: got None for token 0 of sequence 0; expected a text"),
        ("value_name", 3, "value_name"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(widget, monkeypatch, name, value, complaint):
    before, sent = state(widget), messages(widget, monkeypatch)
    with pytest.raises(traitlets.TraitError, match=complaint):
        setattr(widget, name, value)
    assert state(widget) == before
    assert sent == []


def test_the_constructor_and_show_refuse_the_same(widget):
    with pytest.raises(traitlets.TraitError, match="mask: got 1 rows of 2; expected 2 rows of 4"):
        TokenMask(TOKENS, [[1, 0]])
    with pytest.raises(traitlets.TraitError, match="labels: got 2 rows of 1; expected 2 rows of 4"):
        TokenMask(TOKENS, MASK, [["prompt"], ["prompt"]])
    before = state(widget)
    with pytest.raises(traitlets.TraitError, match="values: got 1 rows of 2; expected 1 rows of 1"):
        widget.show([["a"]], [[1]], values=[[1.0, 2.0]])
    assert state(widget) == before


def test_show_replaces_everything_in_one_message(widget, monkeypatch):
    sent = messages(widget, monkeypatch)
    widget.show([["a", "b"]], [[0, 1]])
    assert (widget.tokens, widget.mask, widget.labels) == ((("a", "b"),), ((0, 1),), (("prompt", "response"),))
    assert widget.values == ()
    assert len(sent) == 1
    assert {"tokens", "mask", "labels", "values"} <= set(sent[0]["state"])


def test_traits_can_be_set_together_without_show(widget):
    with widget.hold_trait_notifications():
        widget.values = ()
        widget.mask = torch.ones(1, 1)
        widget.labels = [["eos"]]
        widget.tokens = [["a"]]
    assert (widget.mask, widget.values) == (((1,),), ())
    with pytest.raises(traitlets.TraitError, match="labels"), widget.hold_trait_notifications():  # noqa: PT012
        widget.tokens = [["a", "b"]]
        widget.mask = [[1, 0]]
    assert (widget.tokens, widget.mask) == ((("a",),), ((1,),))


def test_the_focus_is_always_on_a_token(widget):
    widget.set_state({"focused": [1, 3]})
    assert widget.focused == (1, 3)
    for outside in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(traitlets.TraitError, match=r"focused: got .* expected a place in 2 rows of 4"):
            widget.focused = outside
    widget.show([["a", "b"]], [[0, 1]])
    assert widget.focused == (0, 1)


def test_a_mask_travels_as_text(widget, monkeypatch):
    sent = messages(widget, monkeypatch)
    widget.mask = torch.ones(2, 4, dtype=torch.bool)
    assert [message["state"] for message in sent] == [{"mask": "1111 1111"}]


def test_a_painted_mask_is_taken_and_not_sent_back(widget, monkeypatch):
    seen, sent = [], messages(widget, monkeypatch)
    widget.observe(lambda change: seen.append(change["new"]), "mask")
    hand(widget, "1111 0110")
    assert widget.mask == ((1, 1, 1, 1), (0, 1, 1, 0))
    assert seen == [widget.mask]
    assert [message["method"] for message in sent] == ["echo_update"]


def test_the_kernel_has_the_last_word(widget, monkeypatch):
    sent = messages(widget, monkeypatch)
    widget.observe(lambda change: setattr(widget, "mask", MASK), "mask")
    hand(widget, "1111 0110")
    assert sent[-1] == {"method": "update", "state": {"mask": "0111 0110"}, "buffer_paths": []}


def test_a_mask_corrected_to_what_it_was_is_sent_back_too(monkeypatch):
    class Stubborn(TokenMask):
        @traitlets.validate("mask")
        def _keep(self, proposal):
            return ((0, 1, 1, 1), (0, 1, 1, 0))

    widget = Stubborn(TOKENS, MASK)
    sent = messages(widget, monkeypatch)
    hand(widget, "1111 0110")
    assert sent[-1] == {"method": "update", "state": {"mask": "0111 0110"}, "buffer_paths": []}
    widget.close()


@pytest.mark.parametrize("text", ["11", "1111 11", "1112 1111", "1111  1111", "", "<b>", None, 7, {"a": 1}])
def test_a_page_that_sends_nonsense_gets_the_mask_back(widget, monkeypatch, text):
    before, sent = widget.mask, messages(widget, monkeypatch)
    with pytest.raises(traitlets.TraitError, match="mask"):
        hand(widget, text)
    assert widget.mask == before
    assert sent[-1]["state"] == {"mask": "0111 0110"}


def test_values_that_are_no_numbers_in_json(widget):
    widget.values = [[math.nan, math.inf, -math.inf, -0.0], [0.0] * 4]
    sent = widget.get_state("values")["values"]
    assert sent[0] == ["NaN", "Infinity", "-Infinity", -0.0]
    json.dumps(sent, allow_nan=False)


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<!--",
    "&lt;b&gt;",
    "\u202eabc",
    "\u2066\u2069\u200f",
    "\x00\x1b[31m",
    "\ud800",
    "\udfff\ud800",
    "a" * 100_000,
    "Z" + "\u0301" * 1000,
    "\u05e9\u05dc\u05d5\u05dd",
    "😀",
    "",
    " ",
    "{{7*7}}",
    "${7*7}",
    "javascript:alert(1)",
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
]


def test_hostile_text_becomes_visible_short_and_fit_for_json():
    texts = [f"{HOSTILE[n % len(HOSTILE)]}{n}" for n in range(500)]
    widget = TokenMask([texts], [[0] * 500], notes=[texts], value_name=HOSTILE[7])
    for text in (*widget.tokens[0], *widget.notes[0], widget.value_name):
        assert text.isprintable()
        assert len(text) <= 6 * 81
        text.encode("utf-8")
    json.dumps(widget.get_state(), default=str, ensure_ascii=False).encode("utf-8")
    assert widget.tokens[0][7] == "xd8007"
    assert widget.tokens[0][4] == "x202eabc4"
    assert "<" not in repr(widget)
    widget.close()


def test_the_repr_is_the_mask(widget):
    assert repr(widget) == "TokenMask(mask='0111 0110')"
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"] == repr(widget)
    assert "application/vnd.jupyter.widget-view+json" in data


def test_the_text_of_a_long_mask_is_not_cut():
    widget = TokenMask([["a"] * 128] * 16, torch.ones(16, 128))
    data = widget._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert data["text/plain"].count("1") == 16 * 128
    widget.close()


def test_the_module_is_its_files_and_needs_no_other():
    esm = str(TokenMask._esm)
    assert esm == page_text("view.js", "token_grid.js", "token_mask.js")
    assert "import " not in "".join(line for line in esm.splitlines() if not line.startswith("//"))
    assert "http" not in esm + str(TokenMask._css)
    assert "innerHTML" not in esm


def test_a_closed_widget_is_freed(widget):
    other = TokenMask(TOKENS, MASK)
    other.mask = 1 - torch.tensor(MASK)
    hand(other, "1111 1111")
    gone = weakref.ref(other)
    other.close()
    del other
    gc.collect()
    assert gone() is None
