"""What every lesson owes its reader and its tests. That the outputs are right, nbval checks; that there are
outputs to check, and short cells, is checked here."""

import ast
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from colab_cell import SOURCE, add
from run_notebooks import clean

from sft_edu.course.lessons import lessons

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9]*.ipynb"))
APPENDICES = sorted({*FOLDER.glob("*.ipynb")} - {*LESSONS})
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))

MIN_COMPARED = 6  # outputs that nbval compares, in each lesson
MIN_COMPARED_IN_SOLUTION = 2  # a right answer and a wrong one
MAX_IGNORED = 2  # cells whose output it may ignore
MAX_STATEMENTS = 6  # in a cell; a question with its options is one
MAX_LINES = 12  # in a cell

DEFINITION = re.compile(r"^\s*(async\s+)?(def|class)\s", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Texts in which nbval could not see a wrong number.
SAYS_NOTHING = re.compile(r"<Figure size .*>|<[\w.]+ object at .*>")

every_notebook = pytest.mark.parametrize(
    "path", LESSONS + APPENDICES + SOLUTIONS, ids=lambda path: str(path.relative_to(FOLDER).with_suffix(""))
)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def links(path: Path) -> list[str]:
    return LINK.findall("\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown"))


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
    cells = [cell for cell in code_cells(path) if "colab" not in tags(cell)]
    least = min(
        MIN_COMPARED_IN_SOLUTION if path in SOLUTIONS else MIN_COMPARED, len(cells) if path in APPENDICES else 99
    )
    assert sum(len(texts(cell)) for cell in cells) >= least


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_a_solution_begins_with_a_right_answer_and_shows_a_wrong_one(path: Path):
    verdicts = [text for cell in code_cells(path) for text in texts(cell) if text.startswith(("Correct.", "Not yet."))]
    assert [text.partition(".")[0] for text in (verdicts[0], verdicts[-1])] == ["Correct", "Not yet"], verdicts


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
        if not {"exercise", "colab"} & {*tags(cell)}:
            statements = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.stmt)]
            assert 1 <= len(statements) <= MAX_STATEMENTS, cell.source
            assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
            assert not DEFINITION.search(cell.source), cell.source


@every_notebook
def test_opens_in_every_editor_of_notebooks(path: Path):
    """Jupyter Notebook and VS Code read the same format; they know the plain types, and need cells with ids."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    stored = {kind for cell in code_cells(path) for output in cell.outputs for kind in output.get("data", {})}
    assert stored <= {"text/plain", "text/html", "image/png"}


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_says_what_the_start_page_shows(path: Path):
    (lesson,) = [lesson for lesson in lessons() if lesson.name == path.stem]
    assert lesson.title.startswith(f"{int(path.stem[:2])}. ")
    assert lesson.minutes > 0
    assert len(lesson.questions) == sum(cell.source.count("Prediction(") for cell in code_cells(path))
    assert lesson.exercises


@every_notebook
def test_the_first_code_cell_is_for_colab(path: Path):
    assert add(read(path)) == read(path), "python tools/colab_cell.py adds it"
    if cells := code_cells(path):
        assert cells[0].source == SOURCE
        assert cells[0].outputs == []


def test_the_cell_for_colab_installs_there_and_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch):
    done = []
    shell = SimpleNamespace(run_line_magic=lambda *call: done.append(call))
    given = {"get_ipython": lambda: shell, "input": lambda question: " https://example.org/fork \n"}
    exec(SOURCE, dict(given))
    assert done == []
    colab = ModuleType("google.colab")
    colab.output = SimpleNamespace(enable_custom_widget_manager=lambda: done.append("widgets"))
    for name, module in (("google", ModuleType("google")), ("google.colab", colab)):
        monkeypatch.setitem(sys.modules, name, module)
    exec(SOURCE, dict(given))
    assert done == [("pip", "install --quiet 'sft-edu[lab] @ git+https://example.org/fork'"), "widgets"]


def test_what_is_seen_of_the_hidden_cell_fits_a_narrow_page():
    comments = [line for line in SOURCE.splitlines() if line.startswith("#")]
    assert SOURCE.startswith(comments[0])
    assert max(map(len, comments)) <= 50


def test_the_cell_for_colab_moves_the_counts_below_it():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# x", id="a")])
    output = nbformat.v4.new_output("execute_result", execution_count=1)
    notebook.cells.append(nbformat.v4.new_code_cell("1", execution_count=1, outputs=[output], id="b"))
    notebook = add(add(notebook))
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, 2]
    assert notebook.cells[2].outputs[0].execution_count == 2
    notebook.cells[1].source = "an older one"
    assert add(notebook).cells[1].source == SOURCE


@pytest.mark.parametrize(("path", "following"), list(pairwise(LESSONS)), ids=lambda path: path.stem)
def test_leads_to_the_next_lesson(path: Path, following: Path):
    assert following.name in links(path)
