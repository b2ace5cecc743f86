"""What every lesson owes its reader and its tests. That the outputs are right, nbval checks; that there are
outputs to check, short cells and links that lead somewhere is checked here."""

import ast
import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from run_notebooks import clean

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))

MIN_COMPARED = 6  # outputs that nbval compares, in each lesson
MIN_COMPARED_IN_SOLUTION = 2  # a right answer and a wrong one
MAX_IGNORED = 2  # cells whose output it may ignore
MAX_STATEMENTS = 6  # in a cell; a question with its options is one
MAX_LINES = 12  # in a cell

DEFINITION = re.compile(r"^\s*(async\s+)?(def|class)\s", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
# Texts in which nbval could not see a wrong number.
SAYS_NOTHING = re.compile(r"<Figure size .*>|<[\w.]+ object at .*>")

every_notebook = pytest.mark.parametrize(
    "path", LESSONS + SOLUTIONS, ids=lambda path: str(path.relative_to(FOLDER).with_suffix(""))
)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def links(path: Path) -> list[str]:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    return [markdown or html for markdown, html in LINK.findall(text)]


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The outputs of a cell that nbval compares word by word."""
    found = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return [text for text in found if text.strip() and not SAYS_NOTHING.fullmatch(text.strip())]


def test_there_are_lessons():
    assert LESSONS
    assert {path.name for path in SOLUTIONS} <= {path.name for path in LESSONS}


@every_notebook
def test_ran_once_from_top_to_bottom(path: Path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@every_notebook
def test_no_error_is_stored(path: Path):
    assert [o.evalue for cell in code_cells(path) for o in cell.outputs if o.output_type == "error"] == []


@every_notebook
def test_there_is_something_to_compare(path: Path):
    least = MIN_COMPARED_IN_SOLUTION if path in SOLUTIONS else MIN_COMPARED
    assert sum(len(texts(cell)) for cell in code_cells(path)) >= least


@every_notebook
def test_nbval_looks_at_nearly_everything(path: Path):
    cells = code_cells(path)
    ignored = [cell for cell in cells if "nbval-ignore-output" in tags(cell)]
    assert len(ignored) <= MAX_IGNORED
    special = {tag for cell in cells for tag in tags(cell) if tag.startswith(("nbval", "raises"))}
    assert special <= {"nbval-ignore-output"}
    # The same orders can be given in comments; one place is enough.
    assert not [cell.source for cell in cells if re.search(r"#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source)]


@every_notebook
def test_is_stored_clean(path: Path):
    assert clean(read(path)) == read(path), "make notebooks cleans it"


@every_notebook
def test_cells_are_short_and_define_nothing(path: Path):
    for cell in code_cells(path):
        if "exercise" not in tags(cell):
            statements = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.stmt)]
            assert 1 <= len(statements) <= MAX_STATEMENTS, cell.source
            assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
            assert not DEFINITION.search(cell.source), cell.source


@every_notebook
def test_local_links_lead_somewhere(path: Path):
    local = [link for link in links(path) if not re.match(r"[a-z][a-z0-9+.-]*:|#", link)]
    assert [link for link in local if not (path.parent / unquote(link.split("#")[0])).exists()] == []


@pytest.mark.parametrize(("path", "following"), list(pairwise(LESSONS)), ids=lambda path: path.stem)
def test_leads_to_the_next_lesson(path: Path, following: Path):
    assert following.name in links(path)
