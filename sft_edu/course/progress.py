"""What a learner has predicted and solved, kept in a small file of their own beside the lessons.

Nothing is kept unless a folder opted in, which `sft-edu lab` does, and then only for notebooks that run in its
`notebooks/`: tests, solutions and other people's scripts leave no trace. A folder that cannot be written costs a
learner the marks, never the lesson.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from sft_edu.course.lessons import NOTEBOOKS
from sft_edu.training.whole_file import write_whole

if TYPE_CHECKING:
    from sft_edu.exercises.verdict import Verdict

PROGRESS = "sft_edu_progress.json"
# Written by `sft-edu lab` into a folder of lessons.
MANIFEST = ".sft_edu_lessons.json"
# The same for lessons that are opened where they lie, in a repository.
VARIABLE = "SFT_EDU_PROGRESS_FOLDER"

_VERSION = 1
_SECONDS_TO_WAIT = 2  # for another notebook that writes at this moment


class Progress:
    """The predictions made and the exercises tried in one folder of lessons.

    Args:
        folder: the one that holds `notebooks/`; None keeps nothing.

    Attributes:
        predictions: question -> `{"first": the first answer, "right": whether it was}`.
        exercises: name of the check -> `{"tries": how many, "solved": whether one passed}`.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.predictions: dict[str, dict] = {}
        self.exercises: dict[str, dict] = {}
        if folder is not None:
            with suppress(OSError, _Damaged):
                self._take(_read(folder / PROGRESS))

    @property
    def kept(self) -> bool:
        """Whether something new can be stored."""
        return self.folder is not None and os.access(self.folder, os.W_OK)

    def predicted(self, question: str, choice: str, right: bool) -> None:
        """Keep the first answer to a question: later ones are no predictions."""
        self._change(lambda: self.predictions.setdefault(question, {"first": choice, "right": right}))

    def tried(self, exercise: str, passed: bool) -> None:
        """Count a try, and remember for good that one passed."""

        def change() -> None:
            before = self.exercises.get(exercise, {})
            self.exercises[exercise] = {
                "tries": before.get("tries", 0) + 1,
                "solved": before.get("solved", False) or passed,
            }

        self._change(change)

    def _change(self, change: Callable[[], object]) -> None:
        """Read, change and write under a lock: two lessons may be open at once. A failure to store is silent."""
        if self.folder is None:
            return
        path, lock = self.folder / PROGRESS, FileLock(self.folder / f".{PROGRESS}.lock", timeout=_SECONDS_TO_WAIT)
        with suppress(OSError, NotImplementedError), lock:  # the latter where a file system has no locks
            try:
                self._take(_read(path))
            except _Damaged:
                path.rename(_free_name(path))
            change()
            stored = {"version": _VERSION, "predictions": self.predictions, "exercises": self.exercises}
            write_whole(path, json.dumps(stored, indent=1).encode())

    def _take(self, stored: dict) -> None:
        self.predictions, self.exercises = stored["predictions"], stored["exercises"]


class _Damaged(Exception):
    """The file is there, and is not one of ours."""


def current() -> Progress:
    """The progress of the learner whose lesson runs in this process."""
    return Progress(_folder())


def remembered(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """A check of an exercise whose verdicts are counted; "not started" is none."""

    @functools.wraps(check)
    def run(*arguments: Any, **keywords: Any) -> Verdict:
        verdict = check(*arguments, **keywords)
        if verdict.mistake != "not-started":
            current().tried(check.__name__, verdict.passed)
        return verdict

    return run


def _folder() -> Path | None:
    """The folder of lessons that this process runs in, if it opted in."""
    try:
        here = Path.cwd()
    except OSError:  # it was deleted meanwhile
        return None
    if here.name != NOTEBOOKS:
        return None
    chosen = os.environ.get(VARIABLE)
    opted_in = (here.parent / MANIFEST).is_file() or (chosen and Path(chosen).resolve() == here.parent)
    return here.parent if opted_in else None


def _read(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"predictions": {}, "exercises": {}}
    except (ValueError, RecursionError):
        raise _Damaged from None
    if not (isinstance(stored, dict) and stored.get("version") == _VERSION):
        raise _Damaged
    for part in (stored.get("predictions"), stored.get("exercises")):
        if not (isinstance(part, dict) and all(isinstance(entry, dict) for entry in part.values())):
            raise _Damaged
    return stored


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.stem}.damaged_{number}.json")).exists():
        number += 1
    return free
