"""Every lesson, run from top to bottom in a real JupyterLab."""

import os
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from run_notebooks import METADATA

from .lab_page import ROOT, LabPage, Server

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_lab_answers(server: Server):
    assert server.get("/lab") == 200


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_lesson_runs_in_lab(lab: LabPage, lesson: Path):
    lab.open(lesson.name)
    lab.run_all()
    lab.watch_jumps()
    lab.scroll_through()
    assert lab.jumps() == []
    shots = os.environ.get("SFT_EDU_SHOTS")
    if shots:
        lab.screenshots(Path(shots), lesson.stem)
    assert lab.errors() == []
    assert lab.console_errors == []
    lab.close()


def test_a_saved_lesson_opens_with_its_texts_and_not_with_dead_widgets(lab: LabPage):
    lab.open("00_start_here.ipynb")
    lab.run_all()
    lab.command("docmanager:save")
    lab.close()
    lab.open("00_start_here.ipynb")
    lab.page.wait_for_timeout(1000)  # a dead widget is given up after a while
    assert lab.errors() == []
    shown = lab.page.locator(".jp-Notebook").first.inner_text()
    assert "Predict. The masked sum is -2.8 and G is 2." in shown
    assert lab.page.locator(".jp-OutputArea img").count() == 1  # the step in one picture
    lab.close()


BROKEN = {
    "Error: boom": """
import anywidget
class Broken(anywidget.AnyWidget):
    _esm = "export default { render() { throw new Error('boom') } }"
Broken()""",
    "Javascript Error": """
from IPython.display import Javascript
Javascript("throw new Error('boom')")""",
    "Loading widget...": """
from IPython.display import display
view = {"model_id": "gone", "version_major": 2, "version_minor": 0}
display({"application/vnd.jupyter.widget-view+json": view}, raw=True)""",
    "ZeroDivisionError: division by zero": "1 / 0",
}


def test_broken_outputs_are_seen(lab: LabPage):
    cells = [new_code_cell(source.strip()) for source in BROKEN.values()]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.server.folder / "broken.ipynb")
    lab.open("broken.ipynb")
    lab.run_all()
    seen = "\n".join(lab.errors() + lab.console_errors)
    assert [sign for sign in BROKEN if sign not in seen] == []
    lab.close()
