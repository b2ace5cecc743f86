"""Curves that grow while something runs, in panels side by side."""

from __future__ import annotations

import traitlets

from sft_edu.scaling import RULES
from sft_edu.widgets.live_view import LiveView, number, records, text, wrong
from sft_edu.widgets.page import page_text

LOOKS = (*RULES, "held_out", "gradient", "clipped", "before")
"""What a line can be the line of: a run under a rule, what was held out of it, a gradient before and after clipping,
the run before this one. curves.css has the colour and the dashes of each; plots.py the same for saved pictures."""


def _look(where: str, value: object) -> str:
    if value not in LOOKS:
        raise wrong(where, value, f"one of {', '.join(LOOKS)}")
    return value


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong(where, value, "True or False")
    return value


def _limits(where: str, value: object) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wrong(where, value, "[low, high]")
    low, high = (number(where, end) for end in value)
    if not low < high:
        raise wrong(where, value, "[low, high] with low < high")
    return [low, high]


def _points(where: str, value: object) -> list[list[float]]:
    if not isinstance(value, list | tuple):
        raise wrong(where, value, "a list of [x, y]")
    return [[number(where, x), number(where, y)] for x, y in value]


def _index(where: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise wrong(where, value, "the number of a panel, from 0")
    return value


_PANEL = {"title": text, "text": text, "limits": _limits, "log": _flag}
_LINE = {"panel": _index, "label": text, "look": _look, "points": _points}


class Curves(LiveView):
    """Panels with one horizontal axis in common, and lines in them.

    Args:
        panels: dicts with title, text (what is printed for the value as it is now), limits ([low, high] of the vertical
            axis) and log (whether that is logarithmic; points that are not positive are left out then).
        lines: dicts with panel (its number), label, look (one of `LOOKS`) and points, a list of [x, y].
        before: lines of an earlier run, drawn behind the others. Apart, because they seldom change.
        end: the horizontal axis goes from 0 to it.
        x_title: what the horizontal axis measures.
        status: a line above the panels, for what changes all the time. It is not read out.
        words: a sentence or two on what the curves show, read out once they have stopped changing.
    """

    _esm = page_text("view.js", "axis.js", "curves.js")
    _css = page_text("view.css", "curves.css")
    panels = traitlets.List().tag(sync=True)
    lines = traitlets.List().tag(sync=True)
    before = traitlets.List().tag(sync=True)
    end = traitlets.Float(1.0).tag(sync=True)
    x_title = traitlets.Unicode().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    words = traitlets.Unicode().tag(sync=True)

    @traitlets.validate("panels")
    def _check_panels(self, proposal) -> list[dict]:
        panels = records("panels", proposal["value"], _PANEL, {"text": "", "log": False})
        for index, panel in enumerate(panels):
            if panel["log"] and panel["limits"][0] <= 0:
                raise wrong(f"panels[{index}]['limits']", panel["limits"], "low > 0 where log is True")
        return panels

    @traitlets.validate("lines", "before")
    def _check_lines(self, proposal) -> list[dict]:
        return records(proposal["trait"].name, proposal["value"], _LINE, {})

    @traitlets.validate("end")
    def _check_end(self, proposal) -> float:
        end = number("end", proposal["value"])
        if end <= 0:
            raise wrong("end", end, "a number above 0")
        return end

    @traitlets.validate("x_title", "status", "words")
    def _check_text(self, proposal) -> str:
        return text(proposal["trait"].name, proposal["value"])

    def __repr__(self) -> str:
        lines = [f"Curves: {self.x_title}, 0 to {self.end:g}"]
        width = max((len(panel["title"]) for panel in self.panels), default=0)
        for index, panel in enumerate(self.panels):
            lines.append(f"  {panel['title'].ljust(width)}  {panel['text']}".rstrip())
            here = [line for line in (*self.lines, *self.before) if line["panel"] == index]
            lines += [f"    {line['label']}: {len(line['points'])} points" for line in here]
        return "\n".join([*lines, *filter(None, [self.status, self.words])])
