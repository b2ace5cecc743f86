"""What a learner has done is kept where they asked for it, nowhere else, and is never lost."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sft_edu.course.progress
from sft_edu import exercises
from sft_edu.course.lessons import course_folder, lessons
from sft_edu.course.progress import MANIFEST, PROGRESS, VARIABLE, Progress, current
from sft_edu.widgets import Prediction, StartPage

ROOT = Path(__file__).resolve().parents[1]
CHECKS = [name for name in exercises.__all__ if name.startswith("check_")]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of lessons that opted in, with a kernel in it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / MANIFEST).write_text("{}")
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def stored(folder: Path) -> dict:
    return json.loads((folder / PROGRESS).read_text())


def ask() -> Prediction:
    return Prediction("Is it so?", ["yes", "no"], "yes", "It is.")


def test_a_prediction_is_kept_once_and_the_first_counts(folder):
    question = ask()
    for choice in ("no", "yes"):
        question.choice = choice
        question.reveal()
    assert stored(folder)["predictions"] == {"Is it so?": {"first": "no", "right": False}}


def test_a_prediction_that_was_not_made_is_not_kept(folder):
    ask().reveal()
    assert not (folder / PROGRESS).exists()


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_counts_its_tries(folder, name):
    more = {"check_returned_loss": {"gradient_accumulation_steps": 3}}.get(name, {})
    check = getattr(exercises, name)
    check(..., **more)
    assert not (folder / PROGRESS).exists()  # not started is no try

    def wrong(*arguments, **keywords):
        raise ValueError("my mistake")

    for tries in (1, 2):
        assert not check(wrong, **more).passed
        assert stored(folder)["exercises"] == {name: {"tries": tries, "solved": False}}


def test_solved_stays_solved(folder):
    for answer in (1, 2.8 / 9, 1):
        exercises.check_returned_loss(answer, gradient_accumulation_steps=3)
    assert stored(folder)["exercises"] == {"check_returned_loss": {"tries": 3, "solved": True}}


def test_the_stored_lessons_ask_for_checks_that_exist():
    assert {name for lesson in lessons() for name in lesson.exercises} <= set(CHECKS)


@pytest.mark.parametrize("place", [".", "notebooks/solutions", "elsewhere"])
def test_only_lessons_are_counted(folder, monkeypatch, place):
    (folder / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder / place)
    exercises.check_returned_loss(1, gradient_accumulation_steps=3)
    assert not list(folder.rglob(f"*{PROGRESS}*"))


def test_a_folder_that_did_not_opt_in_stays_as_it_was(folder, monkeypatch):
    (folder / MANIFEST).unlink()
    exercises.check_returned_loss(1, gradient_accumulation_steps=3)
    assert [path.name for path in folder.iterdir()] == ["notebooks"]
    monkeypatch.setenv(VARIABLE, str(folder.parent))
    exercises.check_returned_loss(1, gradient_accumulation_steps=3)
    assert [path.name for path in folder.iterdir()] == ["notebooks"]
    monkeypatch.setenv(VARIABLE, str(folder))  # as `make lab` does for the lessons of a repository
    exercises.check_returned_loss(1, gradient_accumulation_steps=3)
    assert stored(folder)["exercises"]["check_returned_loss"]["tries"] == 1


def test_a_working_folder_that_is_gone_does_no_harm(folder, monkeypatch):
    (folder / "notebooks").rmdir()
    assert current().folder is None


DAMAGED = {
    "empty": b"",
    "cut off": b'{"version": 1, "predictions": {"a": {"fir',
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a later version": b'{"version": 2, "predictions": {}, "exercises": {}}',
    "a part missing": b'{"version": 1, "predictions": {}}',
    "other values": b'{"version": 1, "predictions": {}, "exercises": {"check_a": true}}',
    "very deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_moved_aside_whole(folder, content):
    for number in (1, 2):
        (folder / PROGRESS).write_bytes(content)
        assert (current().exercises, current().predictions) == ({}, {})
        assert (folder / PROGRESS).read_bytes() == content  # looking changes nothing
        exercises.check_returned_loss(1, gradient_accumulation_steps=3)
        assert stored(folder)["exercises"]["check_returned_loss"]["tries"] == 1
        assert (folder / f"sft_edu_progress.damaged_{number}.json").read_bytes() == content


def test_an_interrupted_write_leaves_the_file_before_it(folder, monkeypatch):
    exercises.check_returned_loss(1, gradient_accumulation_steps=3)
    before = (folder / PROGRESS).read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert not exercises.check_returned_loss(1, gradient_accumulation_steps=3).passed
    assert (folder / PROGRESS).read_bytes() == before


def test_a_folder_that_cannot_be_written_costs_the_marks_only(folder, monkeypatch):
    def read_only(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", read_only)  # where the lock is taken
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert exercises.check_returned_loss(2.8 / 9, gradient_accumulation_steps=3).passed
    assert not (folder / PROGRESS).exists()
    assert "cannot be written" in StartPage().summary()


def test_a_folder_in_the_place_of_the_file_does_no_harm(folder):
    (folder / PROGRESS).mkdir()
    assert exercises.check_returned_loss(2.8 / 9, gradient_accumulation_steps=3).passed
    assert (folder / PROGRESS).is_dir()
    assert current().exercises == {}


def test_lessons_that_are_open_at_once_lose_nothing(folder):
    program = (
        "import sys; from pathlib import Path; from sft_edu.course.progress import Progress\n"
        "for i in range(25): Progress(Path(sys.argv[1])).predicted(f'{sys.argv[2]} {i}', 'a', True)"
    )
    outside = os.environ | {"PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", program, folder, str(n)], env=outside) for n in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert len(stored(folder)["predictions"]) == 75


def test_the_start_page_shows_what_was_done(folder):
    first, second = StartPage().lessons[:2]
    untouched = StartPage()
    assert f"0 of {len(first.questions)}" in untouched.line(first)
    assert untouched.summary().startswith(f"0 of {len(lessons())} exercises solved. Next: {first.title}.")

    for name in first.exercises:
        Progress(folder).tried(name, passed=True)
    Progress(folder).predicted(first.questions[0], "a", right=False)
    Progress(folder).predicted("a question of another version", "a", right=False)
    page = StartPage()
    assert page.line(first) == (first.title, str(first.minutes), f"1 of {len(first.questions)}", "✓ solved")
    assert page.line(second)[2:] == (f"0 of {len(second.questions)}", "open")
    assert page.summary() == (
        f"1 of {len(lessons())} exercises solved. Next: {second.title}. "
        "Kept in sft_edu_progress.json, in the folder above that of the lessons."
    )
    shown = re.sub("<.+?>", "", page._repr_html_())
    assert all(text in repr(page) and text in shown for text in (*page.line(first), page.summary(), "predicted"))
    assert f'Next: <a href="{second.name}.ipynb">{second.title}</a>.' in page._repr_html_()

    for lesson in lessons():
        for name in lesson.exercises:
            Progress(folder).tried(name, passed=True)
    assert "All exercises are solved." in StartPage().summary()


def test_the_start_page_links_every_lesson():
    html = StartPage()._repr_html_()
    for lesson in lessons():
        assert f'<a href="{lesson.name}.ipynb">{lesson.title}</a>' in html
        assert (course_folder() / "notebooks" / f"{lesson.name}.ipynb").exists()


def test_a_title_is_text(monkeypatch):
    bad = sft_edu.course.lessons.Lesson("00_x", "<img onerror=x>", 1, (), ("check_x",))
    monkeypatch.setattr("sft_edu.widgets.start_page.lessons", lambda: [bad])
    assert "<img" not in StartPage()._repr_html_()


def test_nothing_is_kept_by_the_tests_of_the_lessons():
    assert current().folder is None
    assert "Nothing kept yet" in StartPage().summary()
