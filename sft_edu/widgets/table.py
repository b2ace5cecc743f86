"""A table of texts, for the page and for a cell's output."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_CELL = "font: inherit; line-height: 20px; padding: 1px 14px 1px 0; white-space: nowrap"


def html_table(columns: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines under their column names; the first cell of a line names it. The first `left` columns are words."""

    def cell(tag: str, column: int, content: str) -> str:
        side = "left" if column < left else "right"
        return f'<{tag} style="{_CELL}; text-align: {side}">{content}</{tag[:2]}>'

    head = "".join(cell('th scope="col"', column, f"<b>{escape(name)}</b>") for column, name in enumerate(columns))
    rows = [
        "".join(cell("td" if column else 'th scope="row"', column, escape(text)) for column, text in enumerate(line))
        for line in lines
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div style="overflow-x: auto; font-size: 12px; font-variant-numeric: tabular-nums">{table}</div>'


def text_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The same as lines of text, in columns."""
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (columns, *lines)]
