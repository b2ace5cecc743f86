"""Horizontal bars that the page keeps up to date."""

from __future__ import annotations

import traitlets

from sft_edu.scaling import RULES
from sft_edu.widgets.live_view import LiveView, number, records, text, wrong
from sft_edu.widgets.page import page_text

COLOURS = ("neutral", "prompt", "response", "padding", "gradient", *RULES)
"""What a bar can be the bar of. bars.css has the colour of each, for light and dark pages; plots.py the light ones."""


def _colour(where: str, value: object) -> str:
    if value not in COLOURS:
        raise wrong(where, value, f"one of {', '.join(COLOURS)}")
    return value


def _number_or_none(where: str, value: object) -> float | None:
    return None if value is None else number(where, value)


_CHECKS = {"label": text, "value": _number_or_none, "text": text, "colour": _colour, "note": text}


class Bars(LiveView):
    """A bar for each row, on one axis, with a marked line to compare with.

    Args:
        rows: dicts with label, value (a finite number, or None for no bar), text (what is printed for the value),
            colour (one of `COLOURS`) and, if you like, note (a small text below the label).
        title: what the bars measure.
        limits: [low, high], the ends of the axis. A bar that goes on beyond them ends in a point. Bars start at 0, or
            at the end next to it.
        reference: where the marked line stands, or None.
        reference_label: what the line means.
        log: a logarithmic axis. Values that are not positive have no bar, only their text.
        words: a sentence or two on what the bars show, read out once they have stopped changing.
    """

    _esm = page_text("view.js", "axis.js", "bars.js")
    _css = page_text("view.css", "bars.css")
    rows = traitlets.List().tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    limits = traitlets.List(default_value=[0.0, 1.0]).tag(sync=True)
    reference = traitlets.Any().tag(sync=True)
    reference_label = traitlets.Unicode().tag(sync=True)
    log = traitlets.Bool().tag(sync=True)
    words = traitlets.Unicode().tag(sync=True)

    @traitlets.validate("rows")
    def _check_rows(self, proposal) -> list[dict]:
        return records("rows", proposal["value"], _CHECKS, {"note": ""})

    @traitlets.validate("limits")
    def _check_limits(self, proposal) -> list[float]:
        limits = [number("limits", end) for end in proposal["value"]]
        if len(limits) != 2 or limits[0] >= limits[1]:
            raise wrong("limits", proposal["value"], "[low, high] with low < high")
        if self.log and limits[0] <= 0:
            raise wrong("limits", proposal["value"], "low > 0 while log is True")
        return limits

    @traitlets.validate("log")
    def _check_log(self, proposal) -> bool:
        if proposal["value"] and self.limits[0] <= 0:
            raise wrong("log", True, f"False while limits are {self.limits}: a logarithmic axis starts above 0")
        return proposal["value"]

    @traitlets.validate("reference")
    def _check_reference(self, proposal) -> float | None:
        return _number_or_none("reference", proposal["value"])

    @traitlets.validate("title", "reference_label", "words")
    def _check_text(self, proposal) -> str:
        return text(proposal["trait"].name, proposal["value"])

    def __repr__(self) -> str:
        lines = [f"Bars: {self.title}"]
        widths = [max((len(row[key]) for row in self.rows), default=0) for key in ("label", "text")]
        for row in self.rows:
            lines.append(f"  {row['label'].ljust(widths[0])}  {row['text'].rjust(widths[1])}  {row['note']}".rstrip())
        if self.reference is not None:
            lines.append(f"  line at {self.reference:g}: {self.reference_label}")
        return "\n".join([*lines, *filter(None, [self.words])])
