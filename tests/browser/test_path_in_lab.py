"""A learner's path in JupyterLab: links that open the next lesson, and a start page that knows what was done."""

import json

import pytest
from playwright.sync_api import expect

from sft_edu.course.progress import MANIFEST, PROGRESS

from .lab_page import LabPage, Server

SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"


@pytest.fixture
def kept(server: Server):
    """The server's folder of lessons keeps progress, as one made by `sft-edu lab` does."""
    folder = server.folder.parent
    (folder / MANIFEST).write_text("{}")
    yield folder / PROGRESS
    for name in (MANIFEST, PROGRESS):
        (folder / name).unlink(missing_ok=True)


def set_and_run(lab: LabPage, part: str, old: str = "", new: str = "") -> None:
    """Run the cell whose source has a part in it, after a change to it."""
    lab.page.evaluate(
        """([part, old, text]) => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          notebook.activeCellIndex = notebook.widgets.findIndex(cell => cell.model.sharedModel.source.includes(part));
          const source = notebook.activeCell.model.sharedModel;
          source.setSource(source.source.replace(old, text));
        }""",
        [part, old, new],
    )
    lab.command("notebook:run-cell")


def opened(lab: LabPage, name: str) -> None:
    lab.page.wait_for_function(
        "name => window.jupyterapp.shell.currentWidget?.context?.path === name", arg=name, timeout=30_000
    )


def test_what_was_done_shows_on_the_start_page(lab: LabPage, kept):
    lab.open("00_start_here.ipynb")
    lab.run_all()
    page = lab.page.locator(SHOWN)
    start = page.locator(".jp-OutputArea-output", has_text="exercises solved").first
    expect(start).to_contain_text("0 of 2")
    page.locator("input[type=radio]").nth(1).click()
    page.get_by_role("button", name="reveal").first.click()
    expect(page.locator(".jp-OutputArea")).not_to_have_count(0)
    set_and_run(lab, "my_loss = ...", "...", "0.311")
    expect(page.locator(".jp-OutputArea-output", has_text="Correct.")).to_be_visible()
    set_and_run(lab, "StartPage()")
    expect(start.locator("tr", has_text="0. Start here")).to_contain_text("1 of 2")
    expect(start.locator("tr", has_text="0. Start here")).to_contain_text("✓ solved")
    expect(start).to_contain_text("Next: 1. The response mask.")
    assert json.loads(kept.read_text())["exercises"] == {"check_returned_loss": {"tries": 1, "solved": True}}
    lab.close()


def test_links_open_the_lessons(lab: LabPage):
    lab.open("00_start_here.ipynb")
    lab.run_all()
    shown = lab.page.locator(SHOWN)
    following = shown.locator(".jp-OutputArea p", has_text="Next:").get_by_role("link", name="0. Start here")
    expect(following).to_have_count(1)
    shown.locator(".jp-OutputArea a", has_text="2. One step").click()
    opened(lab, "02_one_step.ipynb")
    shown.get_by_role("link", name="3. Gradient accumulation").last.click()
    opened(lab, "03_gradient_accumulation.ipynb")
    assert lab.page.url != "about:blank"
    lab.close()


def test_an_erratum_leads_to_the_place_that_shows_it(lab: LabPage):
    """JupyterLab goes to a heading of a lesson that is open; it opens others at their top."""
    lab.open("cheat_sheet.ipynb")
    shown = lab.page.locator(SHOWN)
    row = shown.locator("tr", has_text="E1").first
    row.get_by_role("link").click()
    opened(lab, "02_one_step.ipynb")
    heading = shown.get_by_role("heading", name="Why divide by G twice?")
    expect(heading).to_have_count(1)
    lab.command("docmanager:open", path="cheat_sheet.ipynb")
    opened(lab, "cheat_sheet.ipynb")
    row.get_by_role("link").click()
    opened(lab, "02_one_step.ipynb")
    expect(heading).to_be_in_viewport()
    lab.close()
