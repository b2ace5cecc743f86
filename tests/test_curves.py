"""Curves and answers: what they take, what they say in text, and the page's own arithmetic."""

import re
from pathlib import Path

import pytest
import traitlets

from sft_edu.plots import LINE_LOOK, curve_figure
from sft_edu.scaling import RULES
from sft_edu.widgets import Answers, Bars, Curves, curves

WIDGETS = Path(curves.__file__).parent
PANELS = [
    {"title": "NLL", "text": "0.5000", "limits": [0, 4]},
    {"title": "gradient norm", "text": "2 → 1", "limits": [0.01, 100], "log": True},
]
LINES = [
    {"panel": 0, "label": "training", "look": "token_mean", "points": [[0, 4], [1, 2], [2, 1]]},
    {"panel": 1, "label": "clipped", "look": "clipped", "points": [[1, 0], [2, 1]]},
]
ROW = {"prompt": "upper: cat", "answer": "CAT", "wanted": "CAT", "right": True}


def view() -> Curves:
    return Curves(panels=PANELS, lines=LINES, end=2, x_title="steps", status="running", words="It falls.")


def test_they_say_in_text_what_they_show():
    assert repr(view()) == (
        "Curves: steps, 0 to 2\n"
        "  NLL            0.5000\n"
        "    training: 3 points\n"
        "  gradient norm  2 → 1\n"
        "    clipped: 2 points\n"
        "running\n"
        "It falls."
    )
    wrong = ROW | {"answer": "C\x00", "right": False}
    assert repr(Answers(title="now", rows=[ROW, wrong])) == (
        "Answers: now\n  'upper: cat' -> 'CAT': right\n  'upper: cat' -> 'C•': wrong, expected 'CAT'"
    )


@pytest.mark.parametrize(
    ("trait", "value", "complaint"),
    [
        ("panels", 3, "panels"),
        ("panels", [{"title": "a"}], r"panels\[0\]: got .*; expected a dict with the keys title, text, limits, log"),
        ("panels", [PANELS[0] | {"limits": [1, 1]}], r"panels\[0\]\['limits'\]: got \[1, 1\]; expected \[low, high\]"),
        ("panels", [PANELS[0] | {"limits": 3}], r"\['limits'\]: got 3; expected \[low, high\]"),
        ("panels", [PANELS[0] | {"log": True}], "expected low > 0 where log is True"),
        ("panels", [PANELS[0] | {"log": 1}], r"\['log'\]: got 1; expected True or False"),
        ("lines", [LINES[0] | {"panel": -1}], r"lines\[0\]\['panel'\]: got -1; expected the number of a panel"),
        ("lines", [LINES[0] | {"look": "red"}], r"\['look'\]: got 'red'; expected one of notes, "),
        ("lines", [LINES[0] | {"points": 3}], r"\['points'\]: got 3; expected a list of \[x, y\]"),
        (
            "before",
            [LINES[0] | {"points": [[0, float("nan")]]}],
            r"before\[0\]\['points'\]: got nan; expected a finite",
        ),
        ("lines", [LINES[0] | {"label": 3}], r"\['label'\]: got 3; expected a text"),
        ("end", 0.0, r"end: got 0\.0; expected a number above 0"),
        ("end", float("inf"), "end: got inf; expected a finite number"),
        ("status", 3, "status"),
    ],
)
def test_curves_refuse_what_they_cannot_show(trait, value, complaint):
    one = view()
    before = repr(one)
    with pytest.raises(traitlets.TraitError, match=complaint):
        setattr(one, trait, value)
    assert repr(one) == before


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (ROW | {"right": 1}, r"rows\[0\]\['right'\]: got 1; expected True or False"),
        (ROW | {"answer": None}, r"rows\[0\]\['answer'\]: got None; expected a text"),
        ({"prompt": "a"}, r"rows\[0\]: got .*; expected a dict with the keys prompt, answer, wanted, right"),
    ],
)
def test_answers_refuse_what_they_cannot_show(row, complaint):
    with pytest.raises(traitlets.TraitError, match=complaint):
        Answers(rows=[row])


def test_an_answer_is_made_readable_and_cut():
    (row,) = Answers(rows=[ROW | {"answer": "a\n\u202e\ud800\ufffd" + "x" * 60}]).rows
    assert row["answer"] == "a↵•?•" + "x" * 34 + "…"
    assert len(row["answer"]) == 40


def test_every_look_has_one_style_for_page_and_picture():
    css = (WIDGETS / "curves.css").read_text(encoding="utf-8")
    assert set(re.findall(r'data-look="(\w+)"', css)) == set(curves.LOOKS)
    assert set(curves.LOOKS) <= set(LINE_LOOK)
    for rule in RULES:  # as the bar of the same rule
        assert f'[data-look="{rule}"] {{\n  stroke: {LINE_LOOK[rule]["color"]};' in css
        assert f'[data-colour="{rule}"] {{\n  background-color: {LINE_LOOK[rule]["color"]};' in str(Bars._css)


def test_a_point_stands_where_its_axes_say(evaluate):
    linear, log = {"limits": [0, 4], "log": False}, {"limits": [0.01, 100], "log": True}
    ours = evaluate(
        str(Curves._esm),
        f"[module.pathOf([[0, 4], [1, 2]], 2, {to_js(linear)}), module.pathOf([[1, 0], [2, 1]], 2, {to_js(log)}),"
        f" module.pathOf([], 2, {to_js(linear)})]",
    )
    # The last point comes twice; in the logarithmic panel 0 is left out.
    assert ours == ["0.0,0.0 500.0,500.0 500.0,500.0", "1000.0,500.0 1000.0,500.0", ""]


def to_js(panel: dict) -> str:
    return f"{{limits: {panel['limits']}, log: {str(panel['log']).lower()}}}"


@pytest.mark.parametrize(
    ("limits", "log", "wanted", "ticks"),
    [
        ([0, 6], False, 4, [0, 2, 4, 6]),
        ([0, 51.2], False, 4, [0, 20, 40]),
        ([0, 0.1], False, 4, [0, 0.05, 0.1]),
        ([-1, 1], False, 5, [-1, -0.5, 0, 0.5, 1]),
        ([0.01, 100], True, 4, [0.01, 0.1, 1, 10, 100]),
        ([1, 20], True, 4, [1, 2, 5, 10, 20]),
    ],
)
def test_the_marked_numbers_are_round(evaluate, limits, log, wanted, ticks):
    source = (WIDGETS / "axis.js").read_text(encoding="utf-8")
    assert evaluate(source, f"module.ticksOf({limits}, {str(log).lower()}, {wanted})") == pytest.approx(ticks)
    texts = evaluate(source, "[0, 0.05, 5e-4, 100000, 1234.5].map(module.tickText)")
    assert texts == ["0", "0.05", "5e-4", "1e5", "1234.5"]


def test_a_saved_picture_has_the_same_lines():
    panels = [{"log": False, **panel} for panel in PANELS]
    figure = curve_figure(panels, LINES, 2, "steps")
    first, second = figure.axes
    assert [line.get_xydata().tolist() for line in first.lines] == [LINES[0]["points"]]
    assert (first.get_xlim(), first.get_ylim(), second.get_yscale()) == ((0, 2), (0, 4), "log")
    assert (first.get_title(loc="left"), first.get_title(loc="right"), first.get_xlabel()) == ("NLL", "0.5000", "steps")
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["clipped"]
    assert first.lines[0].get_color() == LINE_LOOK["token_mean"]["color"]
    single = curve_figure(panels, [LINES[0] | {"points": [[0, 4]]}], 2, "steps").axes[0].lines[0]
    assert single.get_marker() == "."  # or one point could not be seen
