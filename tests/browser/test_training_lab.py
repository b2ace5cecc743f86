"""The lab that trains, in a real JupyterLab: it moves, it stops when told, and the page and other cells go on."""

import re
from collections.abc import Iterator

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect
from run_notebooks import METADATA

from .lab_page import SECONDS, LabPage
from .test_live_views_in_lab import kernel

CELLS = ["from sft_edu.widgets import TrainingLab\nlab = TrainingLab()\nlab", "answer = 6 * 7\nanswer"]
STOPS = [
    "slider G",
    "textbox G",
    "slider microbatch",
    "textbox microbatch",
    "combobox rule",
    "combobox optimizer",
    "combobox lr",
    "combobox max_norm",
    "button start",
    "button one step",
    "button reset",
    "checkbox train on prompt tokens too",
    "textbox state",
    "button save PNG",
    "button save SVG",
]
FOCUSED = """() => {
  const { activeElement: element } = document;
  const roles = { BUTTON: 'button', SELECT: 'combobox', INPUT: element.type === 'checkbox' ? 'checkbox' : 'textbox' };
  const label = element.labels?.[0]?.textContent || element.closest('label')?.textContent;
  const beside = element.closest('.widget-inline-hbox')?.querySelector('label')?.textContent;
  const name = element.ariaLabel || label || beside;
  return `${element.role || roles[element.tagName]} ${name || element.textContent}`;
}"""


@pytest.fixture(scope="module")
def notebook(lab: LabPage) -> Iterator[LabPage]:
    cells = [new_code_cell(source) for source in CELLS]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.server.folder / "training.ipynb")
    lab.open("training.ipynb")
    lab.run_all()
    yield lab
    assert lab.errors() == []
    assert lab.console_errors == []
    lab.close()


@pytest.fixture
def output(notebook: LabPage) -> Iterator[Locator]:
    """The lab, before any training."""
    kernel(notebook, "lab.pause(); lab.reset()")
    found = notebook.page.locator(".jp-OutputArea-output").first
    expect(found.locator(".sft-edu-curves-status")).to_contain_text("step 0 of")
    found.scroll_into_view_if_needed()
    yield found
    kernel(notebook, "lab.pause()")


def step(output: Locator) -> int:
    return int(re.search(r"step (\d+) of", output.locator(".sft-edu-curves-status").inner_text())[1])


def press(output: Locator, name: str) -> None:
    output.get_by_role("button", name=name, exact=True).click()


def await_step(output: Locator, wanted: int) -> None:
    for _ in range(300):
        if step(output) >= wanted:
            return
        output.page.wait_for_timeout(100)
    assert step(output) >= wanted


def drawn(output: Locator) -> list[str]:
    lines = output.locator(".sft-edu-curves-drawing polyline")
    return lines.evaluate_all("lines => lines.map(line => line.getAttribute('points'))")


def test_it_fits_on_a_small_screen(notebook: LabPage, output: Locator):
    panel = notebook.page.locator(".jp-WindowedPanel-outer").first.bounding_box()
    box = output.bounding_box()
    assert (box["height"], box["width"]) < (panel["height"], panel["width"])
    for part in [output, *output.locator(".sft-edu-view").all()]:
        assert part.evaluate("part => part.scrollWidth <= part.clientWidth + 1")


def test_curves_and_answers_move_while_it_trains(notebook: LabPage, output: Locator):
    assert drawn(output)[0] == ""
    press(output, "start")
    expect(output.get_by_role("button", name="pause", exact=True)).to_be_focused()
    await_step(output, 5)
    earlier = drawn(output)
    await_step(output, 12)
    assert [len(later) > len(line) for line, later in zip(earlier, drawn(output), strict=True)][0:4:2] == [True] * 2
    expect(output.locator(".sft-edu-curves-status")).to_contain_text(re.compile(r"running on \w+ · .* tokens/s"))
    expect(output.locator("caption")).to_have_text(re.compile(r"held-out answers after step \d+"), timeout=30 * SECONDS)
    verdicts = output.locator(".sft-edu-answers-verdict")
    expect(verdicts).to_have_text([re.compile("[✓✗] (right|wrong)")] * 6)
    press(output, "pause")
    kernel(notebook, "lab.pause()")
    shown = kernel(notebook, "", "[panel['text'] for panel in lab._curves.panels]")
    expect(output.locator(".sft-edu-curves-text")).to_have_text(shown)
    expect(output.locator(".sft-edu-words")).to_have_text(kernel(notebook, "", "lab.words()"))


def test_a_pause_is_answered_at_once_and_nothing_moves_after_it(notebook: LabPage, output: Locator):
    press(output, "start")
    await_step(output, 3)
    press(output, "pause")
    expect(output.locator(".sft-edu-curves-status")).to_contain_text("paused", timeout=2 * SECONDS)
    notebook.page.wait_for_timeout(500)  # the microbatch at hand
    before = step(output), kernel(notebook, "", "(lab.steps, lab._run.training.microbatch)")
    notebook.page.wait_for_timeout(1000)
    assert (step(output), kernel(notebook, "", "(lab.steps, lab._run.training.microbatch)")) == before
    press(output, "resume")
    await_step(output, before[0] + 2)
    press(output, "pause")
    expect(output.get_by_role("button", name="resume", exact=True)).to_be_visible()
    kernel(notebook, "lab.pause()")
    done = kernel(notebook, "", "lab.steps")
    press(output, "one step")
    await_step(output, done + 1)
    expect(output.locator("caption")).to_have_text(f"held-out answers after step {done + 1}")
    press(output, "reset")
    expect(output.locator(".sft-edu-curves-status")).to_contain_text("ready on")
    assert step(output) == 0


def test_other_cells_run_and_the_page_draws_meanwhile(notebook: LabPage, output: Locator):
    page = notebook.page
    press(output, "start")
    await_step(output, 2)
    page.evaluate(
        """async () => {
          const { commands, shell } = window.jupyterapp;
          shell.currentWidget.content.activeCellIndex = 1;
          await commands.execute('notebook:run-cell');
        }"""
    )
    expect(page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output")).to_have_text("42")
    assert kernel(notebook, "", "lab.running") is True
    frames = page.evaluate(
        """() => new Promise(resolve => {
          let frames = 0;
          const end = performance.now() + 1000;
          const count = () => { frames++; performance.now() < end ? requestAnimationFrame(count) : resolve(frames) };
          requestAnimationFrame(count);
        })"""
    )
    assert frames >= 10  # a page that freezes has none
    assert kernel(notebook, "", "lab.running") is True


def test_a_changed_knob_begins_again_and_leaves_a_dotted_line(notebook: LabPage, output: Locator):
    press(output, "start")
    await_step(output, 25)
    output.get_by_label("rule", exact=True).select_option("notes")
    expect(output.locator("[data-look=before]")).to_have_count(6, timeout=30 * SECONDS)  # three, and in the legends
    expect(output.locator(".sft-edu-words")).to_contain_text("Dotted: the run before, with rule=token_mean.")
    expect(output.get_by_role("button", name="pause", exact=True)).to_be_visible()  # it goes on
    await_step(output, 2)
    dots = output.locator(".sft-edu-curves-drawing [data-look=before]").first
    assert dots.evaluate("line => getComputedStyle(line).strokeDasharray") != "none"
    panel = output.get_by_role("img", name=re.compile("^NLL per token, nats: .*; training; held out; run before$"))
    expect(panel).to_be_visible()


def test_it_needs_no_mouse_and_keeps_its_keys(notebook: LabPage, output: Locator):
    page, cells = notebook.page, notebook.page.locator(".jp-Cell").count()
    output.locator(".noUi-handle").first.focus()
    found = []
    for _ in STOPS:
        found.append(page.evaluate(FOCUSED).strip())
        if "textbox" not in found[-1]:
            page.keyboard.press("x")  # would cut the cell
        page.keyboard.press("Tab")
    assert found == STOPS
    kernel(notebook, "lab.reset()")
    start = output.get_by_role("button", name="start", exact=True)
    start.focus()
    page.keyboard.press("Enter")
    await_step(output, 2)
    page.keyboard.press("Space")
    expect(output.locator(".sft-edu-curves-status")).to_contain_text("paused")
    page.keyboard.press("Tab")
    expect(output.get_by_role("button", name="one step", exact=True)).to_be_focused()
    output.get_by_label("optimizer", exact=True).focus()
    page.keyboard.press("ArrowDown")
    expect(output.get_by_label("state")).to_have_value(re.compile("optimizer=sgd"))
    assert page.locator(".jp-Cell").count() == cells


def test_an_error_is_told_on_the_page(notebook: LabPage, output: Locator):
    broken = "lab._run.training.run_microbatch = lambda: 1 / 0"
    kernel(notebook, broken)
    press(output, "start")
    expect(output.get_by_role("alert").filter(has_text="division by zero")).to_be_visible()
    expect(output.locator(".sft-edu-words")).to_contain_text("ZeroDivisionError ended the run.")
    expect(output.get_by_role("button", name="start", exact=True)).to_be_disabled()
    press(output, "reset")
    expect(output.get_by_role("button", name="start", exact=True)).to_be_enabled()
    expect(output.get_by_role("alert").filter(has_text="division by zero")).to_have_count(0)


def test_lines_differ_without_colour(notebook: LabPage, output: Locator):
    press(output, "start")
    await_step(output, 2)
    notebook.page.emulate_media(forced_colors="active")
    styles = output.locator(".sft-edu-curves-panel").nth(1).locator(".sft-edu-curves-drawing polyline")
    looks = styles.evaluate_all(
        "lines => lines.map(line => [getComputedStyle(line).strokeDasharray, getComputedStyle(line).stroke])"
    )
    notebook.page.emulate_media(forced_colors="none")
    assert len({dashes for dashes, _ in looks}) == len(looks) == 2
    assert len({colour for _, colour in looks}) == 1
