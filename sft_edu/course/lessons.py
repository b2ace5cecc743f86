"""The lessons as files: where they lie, and what a lesson asks of its reader."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = "notebooks"

_MINUTES = re.compile(r"^Time: (\d+) minutes", re.MULTILINE)
_QUESTION = re.compile(r"Predict\. (.*?)\n  \( \) ", re.DOTALL)
_CHECK = re.compile(r"\b(check_\w+)\(")


@dataclass(frozen=True)
class Lesson:
    """One lesson, as it was shipped.

    Attributes:
        name: of its file, without the suffix: `00_start_here`.
        title: its first heading: `0. Start here`.
        minutes: the time it says that it takes, 0 if it says none.
        questions: what it asks to predict, in order.
        exercises: the names of the checks of its exercises: `check_returned_loss`.
    """

    name: str
    title: str
    minutes: int
    questions: tuple[str, ...]
    exercises: tuple[str, ...]


def course_folder() -> Path:
    """The folder that holds `notebooks/` and `docs/`: inside an installed package, else the root of the repository.

    Raises:
        FileNotFoundError: neither is there, so the installation is damaged.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "course", package.parent):
        if any((folder / NOTEBOOKS).glob("*.ipynb")):
            return folder
    raise FileNotFoundError(f"lessons: got none in {package / 'course'}; expected notebooks. Install sft-edu again")


def lessons() -> list[Lesson]:
    """Every lesson in order, read from the notebooks that were shipped, not from a learner's copies."""
    return [_read(path) for path in sorted((course_folder() / NOTEBOOKS).glob("[0-9]*.ipynb"))]


def _read(path: Path) -> Lesson:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    # The stored text of a question, not its code: a question may be put together by the cell that asks it.
    shown = [
        "".join(output.get("data", {}).get("text/plain", "")) for cell in cells for output in cell.get("outputs", [])
    ]
    exercises = ["".join(cell["source"]) for cell in cells if "exercise" in cell["metadata"].get("tags", [])]
    return Lesson(
        name=path.stem,
        title=prose.split("\n", 1)[0].removeprefix("# "),
        minutes=int(said[1]) if (said := _MINUTES.search(prose)) else 0,
        questions=tuple(found[1] for text in shown if (found := _QUESTION.match(text))),
        exercises=tuple(dict.fromkeys(name for source in exercises for name in _CHECK.findall(source))),
    )
