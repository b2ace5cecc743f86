"""The report: one file, nothing to fetch, and whatever texts hold, they are shown as text."""

import base64
import math
import random
import re
from html.parser import HTMLParser

import pytest

import sft_edu.commands.report_page
from sft_edu.commands.report_page import as_text, in_words, report_page

HOSTILE_PARTS = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<!--",
    "]]>",
    "</td></table><h1>",
    "\" onmouseover='x'",
    "&lt;b&gt;&amp;",
    "\u202e\u2066right to left",
    "\u200b\ufeff\u2028\u2029",
    "\0\x1b[2J\x07\r\x7f",
    "\ud800\udfff",
    "javascript:alert(1)",
    "{title}{0}%s",
    "日本語 العربية 👩‍👩‍👧",
    "<style>body{display:none}</style>",
    "&#60;b&#62;",
]


def line(step: int, prompt: str = "p", answer: str = "a", **values: object) -> dict[str, object]:
    measured = {"step": step, "nll": 2.0 / step, "grad_norm": 3.0, "clipped_norm": 1.0, "learning_rate": 0.1}
    answers = [{"prompt": prompt, "expected": prompt, "answer": answer, "is_right": prompt == answer}]
    scores = {"entropy": 1.0, "held_out_exact_match": 0.5, "held_out_nll": 1.0, "answers": answers}
    return measured | scores | values


class Elements(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.tags.append("comment")


def hostile_texts(count: int) -> list[str]:
    chance = random.Random(0)
    alone = [*HOSTILE_PARTS, *("".join(map(chr, range(start, start + 64))) for start in range(0, 256, 64))]
    mixed = ["".join(chance.choices(HOSTILE_PARTS, k=3)) for _ in range(count - len(alone))]
    return alone + mixed


def test_hostile_texts_are_shown_as_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sft_edu.commands.report_page, "_svg", lambda lines, **look: "data:"
    )  # shows no texts, and takes time
    plain = Elements(report_page("run", ["words"], [line(1), line(2)], {"data": "d"}))
    allowed = set(plain.tags)
    for text in hostile_texts(500):
        page = report_page(text, [text], [line(1, text, text)], {"data": text, text: 1})
        found = Elements(page)
        assert set(found.tags) <= allowed, text
        assert set(found.attributes) <= set(plain.attributes), text
        page.encode()  # half of a character could not be written
        assert not re.search("[\0-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u2028\ud800-\udfff]", page), text
        visible = "".join(c if c.isprintable() or c in "\n\u200d" else f"\\u{ord(c):04x}" for c in text)
        assert "".join(found.text).count(visible) >= 5, text


def test_long_texts_are_cut():
    assert as_text("a" * 10_000) == "a" * 600 + "…"


def test_nothing_is_fetched():
    page = report_page("run", [], [line(1), line(2)], {})
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert all(
        value.startswith("data:image/svg+xml;base64,") for value in re.findall(r'(?:src|srcset|href)="([^"]*)', page)
    )
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_a_narrow_page_has_its_panels_in_one_column():
    page = report_page("run", [], [line(1), line(2)], {})
    sources = re.findall(r'<source media="(.*?)" srcset="data:image/svg\+xml;base64,(.*?)">', page)
    widths = {
        media: float(re.search(r'<svg [^>]*width="([\d.]+)pt"', base64.b64decode(svg).decode())[1])
        for media, svg in sources
    }
    narrow, dark = "(max-width: 700px)", "(prefers-color-scheme: dark)"
    assert list(widths) == [f"{narrow} and {dark}", narrow, dark]  # a browser takes the first that fits
    assert widths[f"{narrow} and {dark}"] == widths[narrow] == widths[dark] / 2


def test_equal_runs_have_equal_pages():
    lines = [line(step) for step in range(1, 40)]
    assert report_page("run", ["a"], lines, {"a": 1}) == report_page("run", ["a"], lines, {"a": 1})


def test_the_answers_grow_from_the_first_evaluation_to_the_last():
    lines = [line(step, "abc", "abc" if step > 50 else "xyz") for step in range(1, 101)]
    heads = re.findall(r'<th scope="col">(.*?)</th>', report_page("run", [], lines, {}))
    assert heads == ["prompt", "expected", "after step 1", "after step 34", "after step 67", "after step 100"]
    verdicts = re.findall(r'<small class="\w+">(\w+)</small>', report_page("run", [], lines, {}))
    assert verdicts == ["wrong", "wrong", "right", "right"]


def test_the_curves_are_in_words_too():
    lines = [line(1), line(2, clipped_norm=3.0), line(4, held_out_exact_match=1.0)]
    words = in_words(lines)
    assert words in report_page("run", [], lines, {})
    assert "steps 1 to 4" in words
    assert "from 2.0000 to 0.5000 nats" in words
    assert "from 50.0% to 100.0%" in words
    assert "clipped in 2 of 3 steps" in words


@pytest.mark.parametrize("lines", [[], [line(1)], [{"step": 1, "nll": None, "grad_norm": 2.0, "clipped_norm": 1.0}]])
def test_little_is_enough_for_a_page(lines):
    page = report_page("run", ["Stopped."], lines, {"max_norm": math.inf, "data": None})
    assert "Stopped." in page
    assert ("<img" in page) == bool(lines)
