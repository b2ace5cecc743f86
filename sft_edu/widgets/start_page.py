"""The list of lessons, with what the learner has done in each."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from sft_edu.course.lessons import Lesson, lessons
from sft_edu.course.progress import PROGRESS, Progress, current
from sft_edu.widgets.table import text_table

_COLUMNS = ("lesson", "minutes", "predicted", "exercise")
_CELL = "font: inherit; padding: 3px 22px 3px 0; text-align: left; white-space: nowrap"


class StartPage:
    """The lessons in order, their time, the predictions made and the exercises solved, and where to go on.

    Show it again after a lesson: it reads the progress anew each time it is made.
    """

    def __init__(self) -> None:
        self.lessons = lessons()
        self.progress = current()

    def line(self, lesson: Lesson) -> tuple[str, str, str, str]:
        """A lesson's title, minutes, predictions and exercises in words."""
        made = sum(question in self.progress.predictions for question in lesson.questions)
        return (
            lesson.title,
            str(lesson.minutes),
            f"{made} of {len(lesson.questions)}",
            "✓ solved" if _solved(lesson, self.progress) else "open",
        )

    def summary(self) -> str:
        """What is done, what comes next, and where it is kept."""
        return self._summary(lambda lesson: lesson.title)

    def _summary(self, named: Callable[[Lesson], str]) -> str:
        open_ones = [lesson for lesson in self.lessons if not _solved(lesson, self.progress)]
        solved = len(self.lessons) - len(open_ones)
        following = f"Next: {named(open_ones[0])}." if open_ones else "All exercises are solved."
        return f"{solved} of {len(self.lessons)} exercises solved. {following} {_keeping(self.progress)}"

    def __repr__(self) -> str:
        return "\n".join([*text_table(_COLUMNS, [self.line(lesson) for lesson in self.lessons]), self.summary()])

    def _repr_html_(self) -> str:
        head = "".join(_cell("th", f"<b>{name}</b>", ' scope="col"') for name in _COLUMNS)
        rows = []
        for lesson in self.lessons:
            title = _cell("th", _link(lesson), ' scope="row"')
            rest = "".join(_cell("td", escape(text)) for text in self.line(lesson)[1:])
            rows.append(f"<tr>{title}{rest}</tr>")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        # JupyterLab sets the tables of an output in its smallest size.
        return f'<div style="font-size: 14px; overflow-x: auto">{table}<p>{self._summary(_link)}</p></div>'


def _link(lesson: Lesson) -> str:
    return f'<a href="{lesson.name}.ipynb">{escape(lesson.title)}</a>'


def _cell(tag: str, content: str, scope: str = "") -> str:
    return f'<{tag}{scope} style="{_CELL}">{content}</{tag}>'


def _solved(lesson: Lesson, progress: Progress) -> bool:
    return all(progress.exercises.get(name, {}).get("solved") for name in lesson.exercises)


def _keeping(progress: Progress) -> str:
    if progress.kept:
        return f"Kept in {PROGRESS}, in the folder above that of the lessons."
    if progress.folder is not None:
        return f"The folder cannot be written, so {PROGRESS} is not kept."
    return "Nothing kept yet: run this cell in sft-edu lab or make lab, and it shows what you did."
