"""What is written for readers: links lead somewhere, the README's commands are tried, public names are described."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import textwrap
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api_page
import pytest
import torch

from sft_edu.cli import main
from sft_edu.course.lessons import Lesson, lessons

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def files(*patterns: str) -> list[Path]:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(ROOT / name for name in names if name and (ROOT / name).exists())


PAGES = files("*.md", "*.ipynb")

# --- Links ---

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"")
CODE = re.compile(r"^(```|~~~).*?^\1|^(?:    ).*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """The Markdown of a page, without code; of a notebook also the HTML that it has stored."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return CODE.sub("", text)
    cells = json.loads(text)["cells"]
    shown = [output.get("data", {}).get("text/html", "") for cell in cells for output in cell.get("outputs", [])]
    written = [CODE.sub("", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"]
    return "\n".join([*written, *map("".join, shown)])


def headings(path: Path) -> list[str]:
    """The anchors of a page: JupyterLab keeps a heading as it is, GitHub takes the signs out and lowers it."""
    found = re.findall(r"^#+ +(.*?) *$", prose_with_code(path), re.MULTILINE)
    if path.suffix == ".ipynb":
        return [re.sub(r"[`*]", "", text).replace(" ", "-") for text in found]
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found]


def prose_with_code(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def problem(path: Path, link: str) -> str | None:
    """What is wrong with a link, if anything."""
    parts = urlsplit(link)
    if parts.scheme:
        fine = parts.scheme == "https" and re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc)
        return None if fine else "not a https address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.exists():
        return "no such file"
    if not target.is_relative_to(ROOT):
        return "outside of the repository"
    if parts.fragment and unquote(parts.fragment) not in headings(target):
        return "no such heading"
    return None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path):
    links = [markdown or html for markdown, html in LINK.findall(prose(path))]
    assert {link: why for link in links if (why := problem(path, link))} == {}


@pytest.mark.parametrize("path", files("notebooks/*.ipynb"), ids=lambda path: path.stem)
def test_a_lesson_links_only_what_travels_with_it(path: Path):
    local = [markdown or html for markdown, html in LINK.findall(prose(path)) if "://" not in (markdown or html)]
    targets = [(path.parent / unquote(urlsplit(link).path)).resolve() for link in local]
    assert all(target.is_relative_to(ROOT / "notebooks") or target.is_relative_to(ROOT / "docs") for target in targets)


def test_a_broken_link_would_be_found():
    lesson = ROOT / "notebooks" / "02_one_step.ipynb"
    assert problem(lesson, "03_gradient_accumulation.ipynb#A-kept-loss") is None
    assert problem(lesson, "03_gradient_accumulation.ipynb#A-lost-key") == "no such heading"
    assert problem(lesson, "99.ipynb") == "no such file"
    assert problem(lesson, "../../elsewhere") == "no such file"
    assert problem(lesson, "http://example.org") == problem(lesson, "https://") == "not a https address"
    assert problem(ROOT / "README.md", "CONTRIBUTING.md#the-house") is None


def test_every_erratum_has_a_place_in_a_lesson():
    sheet = ROOT / "notebooks" / "cheat_sheet.ipynb"
    rows = re.findall(r"^\| E(\d+) \|.*\[[^]]*\]\(([^)]+)\) \|$", prose_with_code(sheet), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 13))
    assert [link for _, link in rows if problem(sheet, link) or "#" not in link] == []


def test_every_word_of_the_glossary_is_used_in_the_lesson_it_names():
    glossary = ROOT / "notebooks" / "glossary.ipynb"
    rows = re.findall(r"^\| \*\*(.*?)\*\* \| .* \| \[\d+\]\((.*?)\) \|$", prose_with_code(glossary), re.MULTILINE)
    assert len(rows) > 30
    unused = []
    for words, lesson in rows:
        text = (glossary.parent / lesson).read_text(encoding="utf-8").lower()
        for word in re.sub(r"`|, `?\[.*", "", words).split(", "):
            if not re.search(rf"\b{re.escape(word.lower())}\b", text):
                unused.append((word, lesson))
    assert unused == []


# --- The README ---

PROGRAMS = r"make|git|cd|python3?|pip|jupyter|sft-edu|torchrun|docker|npm|sudo|\.venv/bin/\S+"
COMMAND = re.compile(rf"^(?:\$ )?((?:{PROGRAMS}) .*?)(?:\s+# .*)?$")

# Each command of the README, and the test that runs it.
TRIED = {
    "make lab": "test_setup.py::test_first_lab_installs_and_opens_the_first_lesson",
    "make test": "test_setup.py::test_what_the_tests_install_serves_the_lab_too",
    "make lab PYTHON=python3.12": "test_setup.py::test_a_missing_python_is_named",
    'make lab LAB_FLAGS="--port 8899"': "test_setup.py::test_first_lab_installs_and_opens_the_first_lesson",
    'make lab PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"': (
        "test_setup.py::test_first_lab_installs_and_opens_the_first_lesson"
    ),
    ".venv/bin/sft-edu audit my_training.py:step --expect token_mean": (
        "test_docs.py::test_the_audit_of_the_readme_says_what_it_says"
    ),
    ".venv/bin/sft-edu train --data my.jsonl --out my_run --dry-run": (
        "test_docs.py::test_the_training_of_the_readme_begins"
    ),
    ".venv/bin/sft-edu train": "test_train_command.py::test_the_built_in_tasks_are_learned",
    ".venv/bin/sft-edu lab --check": "test_lab_command.py::test_the_check_finds_this_machine_ready_and_writes_nothing",
    "sft-edu lab": "test_lab_command.py::test_lessons_open_from_a_wheel_and_leave_other_settings_alone",
    "sft-edu train": "test_train_command.py::test_the_built_in_tasks_are_learned",
    "pip wheel --no-deps -w dist .": "test_lab_command.py::test_a_wheel_holds_all_that_the_repository_has",
    'pip install "sft_edu-0.1.0-py3-none-any.whl[lab]"': (
        "test_lab_command.py::test_lessons_open_from_a_wheel_and_leave_other_settings_alone"
    ),
}
# Those that no test runs, and why.
NOT_TRIED = {
    "python3 -m venv .venv": "Python's own",
    '.venv/bin/pip install -c constraints.txt -e ".[lab]"': "downloads; `make lab` runs the same line",
    ".venv/bin/sft-edu lab --in-place": "what `make lab` runs",
    ".venv/bin/sft-edu train --data my.jsonl --out my_run --model path/or/hub-id": "see test_pretrained.py",
    ".venv/bin/torchrun --nproc-per-node 2 -m sft_edu train --data my.jsonl --out my_run": "see test_distributed.py",
    ".venv/bin/python -m pytest": "runs this test",
    "make bench": "takes minutes; tests call what the scripts measure",
}


def code_blocks(markdown: str) -> list[str]:
    """The indented and the fenced blocks, without indent and fence."""
    blocks, fence, before = [], False, ""
    for line in markdown.splitlines():
        if line.startswith("```"):
            fence = not fence
            blocks.append([])
        elif fence or line.startswith("    "):
            if not fence and not before.startswith("    ") and before.strip():
                blocks.append([])
            blocks[-1].append(line if fence else line[4:])
        elif blocks and not line.strip():
            blocks[-1].append("")
        else:
            blocks.append([])
        before = line or before
    return [text for block in blocks if (text := "\n".join(block).strip("\n"))]


def is_python(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


BLOCKS = code_blocks(README)
PYTHON = [text for text in BLOCKS if is_python(text)]
LINES = [line for text in BLOCKS if not is_python(text) for line in text.splitlines()]
INLINE = [text for text in re.findall(r"`([^`\n]+)`", README.replace("\n", " ")) if " " in text]
COMMANDS = list(dict.fromkeys(found[1] for line in LINES + INLINE if (found := COMMAND.match(line.strip()))))


def test_the_readme_has_commands_and_python():
    assert {"make lab", "make test"} <= {*COMMANDS}
    assert PYTHON


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_tried(command: str):
    if command in NOT_TRIED:
        return
    assert command in TRIED, "name the test that runs it in TRIED, or say in NOT_TRIED why none does"
    file, _, test = TRIED[command].partition("::")
    assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_nothing_else_is_listed():
    assert {*TRIED, *NOT_TRIED} <= {*COMMANDS}


@pytest.mark.parametrize("text", PYTHON, ids=lambda text: text.split("\n")[0])
def test_python_of_the_readme_runs(text: str, capsys):
    """With the four arguments of the step at hand, as its first example takes them for granted."""
    given = {
        "policy_log_probs": torch.tensor([[-0.5, -0.3]], requires_grad=True),
        "response_mask": torch.tensor([[1, 0]]),
        "gradient_accumulation_steps": 2,
    }
    exec(compile(text, "README.md", "exec"), given)


def test_the_audit_of_the_readme_says_what_it_says(tmp_path, monkeypatch, capsys):
    (command,) = [command for command in COMMANDS if "audit my_training.py" in command]
    (block,) = [text for text in PYTHON if "def step" in text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_training.py").write_text(block)
    assert main(command.split()[1:]) == 1
    said = re.search(r"# (step: .*?)(?:, and|$)", block)[1]
    assert said in capsys.readouterr().out


def test_the_training_of_the_readme_begins(tmp_path, monkeypatch, capsys):
    (command,) = [command for command in COMMANDS if "--dry-run" in command]
    (forms,) = [text for text in code_blocks((ROOT / "docs/training.md").read_text()) if text.startswith("{")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text(forms)
    assert main(command.split()[1:]) == 0
    assert f"{len(forms.splitlines())} examples" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["my.jsonl"]


@pytest.mark.parametrize("lesson", lessons(), ids=lambda lesson: lesson.name)
def test_the_readme_lists_every_lesson_with_its_time(lesson: Lesson):
    link = re.escape(f"| [{lesson.title}](notebooks/{lesson.name}.ipynb) |")
    assert re.search(rf"^{link}.*\| {lesson.minutes} \|$", README, re.MULTILINE)


# --- The library ---

PUBLIC = [(package, name) for package in api_page.PACKAGES for name in importlib.import_module(package).__all__]
PUBLIC = [(package, name) for package, name in PUBLIC if callable(getattr(importlib.import_module(package), name))]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_every_public_name_says_what_it_takes_and_raises(package: str, name: str):
    value = getattr(importlib.import_module(package), name)
    text = inspect.getdoc(value) or ""
    assert len(text.split()) >= 3
    if getattr(value, "_is_protocol", False) or (inspect.isclass(value) and issubclass(value, Warning)):
        return
    parameters = inspect.signature(value).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert not named or re.search(r"^(Args|Attributes):$", text, re.MULTILINE)
    assert [parameter for parameter in named if not re.search(rf"\b{parameter}\b", text)] == []
    if raises(value):
        assert re.search(r"^Raises:$", text, re.MULTILINE)


def raises(value: object) -> bool:
    """Whether the function, or the way to make an object of the class, has a `raise` in it."""
    function = vars(value).get("__init__") if inspect.isclass(value) else inspect.unwrap(value)
    if function is None or function.__code__.co_filename == "<string>":  # written by dataclass
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def test_the_api_page_is_up_to_date():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "python tools/api_page.py writes it"


def test_the_api_page_has_every_public_name():
    names = re.findall(r"^### (\S+)$", api_page.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    wanted = [name for package in api_page.PACKAGES for name in importlib.import_module(package).__all__]
    assert sorted(names) == sorted(wanted)


def map_of_the_house() -> dict[str, int]:
    """Every file and package of sft_edu that CONTRIBUTING's map names -> its line there."""
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("    sft_edu/\n")[2]
    lines = house.partition("    notebooks/")[0].splitlines()
    named = [re.match(r" {6}(\S.*?)(?:  |$)", line) for line in lines]
    return {
        name: number for number, entry in enumerate(named) if entry for name in re.findall(r"(\w+)(?:\.py|/)", entry[1])
    }


def test_the_map_of_the_house_names_every_room():
    rooms = {path.stem for path in (ROOT / "sft_edu").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert {*map_of_the_house()} == rooms - {"__init__", "__pycache__"}


def test_a_module_imports_only_from_modules_above_it_in_the_map():
    order, upward = map_of_the_house(), []
    for path in set((ROOT / "sft_edu").rglob("*.py")) - {ROOT / "sft_edu/__init__.py"}:
        room = path.relative_to(ROOT / "sft_edu").parts[0].removesuffix(".py")
        statements = ast.parse(path.read_text(encoding="utf-8")).body  # what only type checkers import stands deeper
        imported = [str(node.module) for node in statements if isinstance(node, ast.ImportFrom)]
        rooms = [name.split(".")[1] for name in imported if name.startswith("sft_edu.")]
        upward += [(path.name, other) for other in rooms if order[other] > order[room]]
    assert upward == []
