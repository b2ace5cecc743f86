"""What a model answers, and whether that is right."""

from __future__ import annotations

import traitlets

from sft_edu.widgets.live_view import LiveView, records, text, wrong
from sft_edu.widgets.page import page_text

LONGEST = 40  # characters that are shown


def readable(written: str) -> str:
    """Of a text, what fits into a cell of the table; an arrow for a new line, a dot for what else cannot be seen."""
    written = written.replace("\n", "↵")
    seen = "".join(character if character.isprintable() and character != "\ufffd" else "•" for character in written)
    return seen if len(seen) <= LONGEST else seen[: LONGEST - 1] + "…"


def _shown(where: str, value: object) -> str:
    return readable(text(where, value))


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong(where, value, "True or False")
    return value


_ROW = {"prompt": _shown, "answer": _shown, "wanted": _shown, "right": _flag}


class Answers(LiveView):
    """A table of prompts and answers. A sign and a word say which are right.

    Args:
        rows: dicts with prompt, answer, wanted (the right answer) and right (whether the answer is it).
        title: of the table.
    """

    _esm = page_text("view.js", "answers.js")
    _css = page_text("view.css", "answers.css")
    rows = traitlets.List().tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)

    @traitlets.validate("rows")
    def _check_rows(self, proposal) -> list[dict]:
        return records("rows", proposal["value"], _ROW, {})

    @traitlets.validate("title")
    def _check_title(self, proposal) -> str:
        return text("title", proposal["value"])

    def __repr__(self) -> str:
        lines = [f"Answers: {self.title}"]
        for row in self.rows:
            verdict = "right" if row["right"] else f"wrong, expected {row['wanted']!r}"
            lines.append(f"  {row['prompt']!r} -> {row['answer']!r}: {verdict}")
        return "\n".join(lines)
