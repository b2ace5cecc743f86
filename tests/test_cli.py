"""The command `sft-edu audit`, and what docs/audit.md promises of it."""

import importlib.metadata
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wild_steps import WILD

from sft_edu import audit_accumulation, audit_step, get_response_log_probs
from sft_edu.audit.accumulation_report import LOOP_PROBLEMS
from sft_edu.audit.report import KNOWN, PROBLEMS
from sft_edu.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")

STEPS = """
import sys
from dataclasses import dataclass
from neighbour import halve

print("loading", sys.argv)


@dataclass
class Settings:
    factor: float = 1.0


def sequence_mean(log_probs, mask, steps, constant=1.0):
    loss = -(log_probs * mask).sum(-1).mean() / constant / steps
    loss.backward()
    return loss.detach(), {}


def imports_late(log_probs, mask, steps, constant=1.0):
    import late
    return late.step(log_probs, mask, steps, constant)


def half(log_probs, mask, steps, constant=1.0):
    loss = halve(-(log_probs * mask).sum() / constant / steps)
    loss.backward()
    return loss, {}


class Trainer:
    @staticmethod
    def step(log_probs, mask, steps, constant=1.0):
        return sequence_mean(log_probs, mask, steps, constant)


number = 42

if __name__ == "__main__":
    raise AssertionError("this part is not for import")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with modules in it, and the current one is another."""
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "neighbour.py").write_text("def halve(x):\n    return x / 2\n")
    (tmp_path / "late.py").write_text("from steps import sequence_mean as step\n")
    (tmp_path / "broken.py").write_text(
        "import torch\n\ndef deep():\n    return torch.zeros(2) @ torch.zeros(3)\n\ndeep()\n"
    )
    (tmp_path / "syntax.py").write_text("def step(:\n    pass\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no licence')\n")
    (tmp_path / "needs.py").write_text("import a_package_that_is_not_there\n")
    failing = "try:\n    import json\n    json.loads('{')\nexcept ValueError as error:\n    raise KeyError('k')"
    (tmp_path / "handling.py").write_text(failing + "\n")
    (tmp_path / "chained.py").write_text(failing + " from error\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner.py").write_text("from steps import sequence_mean\n")
    (tmp_path / "package" / "sibling.py").write_text("from .inner import sequence_mean as step\n")
    (tmp_path / "lesson.ipynb").write_text('{"cells": []}')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path
    for name in ("steps", "neighbour", "late", "package", "package.inner", "needs"):
        sys.modules.pop(name, None)


def run(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as left:  # argparse
        status = left.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("function", "options", "status"),
    [
        ("sequence_mean", [], 0),
        ("sequence_mean", ["--expect", "sequence_mean"], 0),
        ("sequence_mean", ["--expect", "token_mean"], 1),
        ("imports_late", ["--expect", "sequence_mean"], 0),
        ("Trainer.step", [], 0),
        ("half", [], 1),
        ("half", ["--expect", "microbatch_mean"], 1),
    ],
)
def test_the_status_says_whether_the_step_is_as_expected(folder, capsys, function, options, status):
    found, out, err = run(capsys, "audit", f"{folder / 'steps.py'}:{function}", *options)
    assert found == status
    assert out.startswith(f"{function.removeprefix('Trainer.')}: ") or function in ("imports_late", "Trainer.step")
    assert err == f"loading ['{folder / 'steps.py'}']\n" or function == "imports_late"
    assert ("Expected" in out) == (status == 1)


def test_a_step_whose_denominator_is_not_measured_does_not_pass(folder, capsys):
    (folder / "coarse.py").write_text(STEPS.replace("log_probs * ", "log_probs.bfloat16() * "))
    status, out, _ = run(capsys, "audit", f"{folder / 'coarse.py'}:sequence_mean")
    assert status == 1
    assert "D = not measured: the gradient is rounded to bfloat16" in out
    assert "audit it again in float32 or float64" in out
    assert out.endswith("Expected a denominator that can be measured.\n")


def test_a_problem_fails_also_where_the_rule_is_the_expected_one(folder, capsys):
    (folder / "attached.py").write_text(STEPS.replace("return loss.detach()", "return loss"))
    status, out, _ = run(capsys, "audit", f"{folder / 'attached.py'}:sequence_mean", "--expect", "sequence_mean")
    assert status == 1
    assert "loss-attached" in out
    assert out.endswith("Expected sequence_mean, D = c·B·G, without problems.\n")


def test_a_relative_file_and_a_dotted_module_are_found_from_the_current_folder(folder, capsys, monkeypatch):
    assert run(capsys, "audit", "../steps.py:sequence_mean")[0] == 0
    monkeypatch.chdir(folder)
    assert run(capsys, "audit", "steps.py:sequence_mean")[0] == 0
    assert run(capsys, "audit", "package.inner:sequence_mean")[0] == 0
    assert run(capsys, "audit", "package.sibling:step")[0] == 0
    assert run(capsys, "audit", "sft_edu.step:sft_microbatch_train_step", "--expect", "notes")[0] == 0


def test_json_has_stable_keys_and_nothing_else_on_standard_output(folder, capsys):
    for function in ("sequence_mean", "half"):
        _, out, err = run(capsys, "audit", f"{folder / 'steps.py'}:{function}", "--json", "--expect", "sequence_mean")
        report = json.loads(out)
        assert out.isascii()
        keys = re.search(r"one object with the keys (.*?)\.\n", DOCS, re.DOTALL)[1]
        assert list(report) == re.findall(r"`(\w+)`", keys)
        assert report["target"] == f"{folder / 'steps.py'}:{function}"
        assert (report["met"], report["ok"]) == ((True, True) if function == "sequence_mean" else (False, False))
        assert err.startswith("loading")
    assert report["problems"] == list(report["details"]) == ["loss-attached"]
    assert (report["rule"], report["formula"], report["expected"]) == (None, "2·c·G", "sequence_mean")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere.py:step", "nowhere.py: there is no such file"),
        ("nowhere/steps:step", "there is no such file"),
        ("../steps.py", "expected path/to/file.py:function or package.module:function"),
        ("../steps.py:", "expected path/to/file.py:function"),
        (":step", "expected path/to/file.py:function"),
        (
            "../steps.py:missing",
            "there is no missing in it. It has Settings, sequence_mean, imports_late, half, Trainer.",
        ),
        ("../steps.py:Trainer.missing", "there is no Trainer.missing in it"),
        ("../steps.py:number", "number is int; expected a function"),
        ("../package:step", "package: it is a folder"),
        ("../lesson.ipynb:step", "lesson.ipynb: it is a notebook; expected a .py file"),
        ("../package/sibling.py:step", "A file of a package is named package.module:function"),
        ("no_such_package.module:step", "there is no module no_such_package"),
        ("json.no_such_module:step", "there is no module json.no_such_module"),
        ("..x:step", "TypeError"),
    ],
)
def test_what_cannot_be_loaded_is_named_and_the_status_is_2(folder, capsys, target, words):
    status, out, err = run(capsys, "audit", target)
    assert (status, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("name", "lines", "last"),
    [
        ("broken.py", ["line 6, in <module>", "line 4, in deep"], "RuntimeError: "),
        ("syntax.py", ["syntax.py", "def step(:"], "SyntaxError: "),
        ("leaves.py", ["line 2, in <module>"], "SystemExit: no licence"),
        ("needs.py", ["line 1, in <module>"], "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("handling.py", ["line 3, in <module>", "line 5, in <module>", "During handling"], "KeyError: 'k'"),
        ("chained.py", ["line 3, in <module>", "line 5, in <module>", "direct cause"], "KeyError: 'k'"),
    ],
)
def test_an_import_that_fails_shows_its_own_lines_and_no_others(folder, capsys, name, lines, last):
    status, out, err = run(capsys, "audit", f"{folder / name}:step")
    assert (status, out) == (2, "")
    assert all(line in err for line in lines)
    assert err.splitlines()[-1].startswith(last)
    assert {Path(file).parent for file in re.findall(r'File "([^"]+)"', err)} == {folder}


def test_a_missing_dependency_of_a_module_is_not_taken_for_the_module(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    status, _, err = run(capsys, "audit", "needs:step")
    assert status == 2
    assert "No module named 'a_package_that_is_not_there'" in err


@pytest.mark.parametrize("arguments", [[], ["audit"], ["audit", "x.py:f", "--expect", "mean"], ["unknown"]], ids=str)
def test_bad_usage_has_status_2_and_says_what_there_is(capsys, arguments):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith("usage: sft-edu")
    if "mean" in arguments:
        assert "sequence_token_mean" in err


def test_help_lists_the_commands_and_the_rules(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert re.search(r"^\s+audit\s+say which scaling rule", out, re.MULTILINE)
    _, out, _ = run(capsys, "audit", "--help")
    assert all(rule in out for rule in KNOWN)


def test_loading_leaves_nothing_behind(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = sorted(folder.rglob("*")), sys.path[:], sys.argv, sys.dont_write_bytecode, dict(sys.modules)
    assert run(capsys, "audit", f"{folder / 'steps.py'}:imports_late")[0] == 0
    assert run(capsys, "audit", f"{folder / 'broken.py'}:step")[0] == 2
    after = sorted(folder.rglob("*")), sys.path[:], sys.argv, sys.dont_write_bytecode
    assert after == before[:4]
    assert sys.modules == before[4]


def test_each_file_has_neighbours_of_its_own(folder, capsys):
    """Two projects with a `neighbour` each, and a third one that was loaded before by somebody else."""
    other, mine = folder / "other", type(sys)("neighbour")
    other.mkdir()
    mine.__file__ = str(folder.parent / "neighbour.py")
    sys.modules["neighbour"] = mine
    (other / "steps.py").write_text(STEPS)
    (other / "neighbour.py").write_text("def halve(x):\n    return x / 4\n")
    for place, formula in ((folder, "2·c·G"), (other, "4·c·G"), (folder, "2·c·G")):
        assert f"D = {formula}\n" in run(capsys, "audit", f"{place / 'steps.py'}:half")[1]
    assert sys.modules["neighbour"] is mine


def test_what_a_file_changes_while_it_is_loaded_is_undone(folder, capsys):
    vandal = "import os, random, sys, torch\nos.chdir('/')\ntorch.set_default_dtype(torch.float64)\nrandom.seed(0)\n"
    (folder / "vandal.py").write_text(STEPS + vandal + "sys.path.append('/nowhere')\n")
    before = Path.cwd(), torch.get_default_dtype(), random.getstate(), sys.path[:]
    assert run(capsys, "audit", f"{folder / 'vandal.py'}:sequence_mean")[0] == 0
    assert (Path.cwd(), torch.get_default_dtype(), random.getstate(), sys.path) == before


def test_a_package_without_init_is_forgotten_too(folder, capsys, monkeypatch):
    (folder / "space").mkdir()
    (folder / "space" / "inner.py").write_text("from steps import half\n")
    monkeypatch.chdir(folder)
    before = dict(sys.modules)
    assert run(capsys, "audit", "space.inner:half")[0] == 1
    assert sys.modules == before


def test_the_command_is_installed_and_is_a_module_too(folder):
    (script,) = [entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.name == "sft-edu"]
    assert script.load() is main
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-m", "sft_edu", "audit", str(folder / "steps.py") + ":sequence_mean"],
        env=environment | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, r"sequence_mean: sequence_mean, D = c\xb7B\xb7G")
    assert not list(folder.rglob("*.pyc"))


# --- The page ---


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize(("step", "passes"), [("the_reference", True), ("forgets_the_minus", False)])
def test_the_pytest_example_of_the_page_runs(step, passes, monkeypatch):
    (example,) = blocks("python")
    monkeypatch.setitem(sys.modules, "my_training", type("module", (), {"sft_step": staticmethod(WILD[step].step)}))
    names = {}
    exec(compile(example, "docs/audit.md", "exec"), names)
    if passes:
        names["test_the_step_is_the_mean_over_sequences"]()
    else:
        with pytest.raises(AssertionError, match="wrong-sign"):
            names["test_the_step_is_the_mean_over_sequences"]()


def test_the_workflow_of_the_page_calls_the_command_as_it_is(folder, capsys, monkeypatch):
    (workflow,) = blocks("yaml")
    (line,) = re.findall(r"- run: sft-edu (.*)", workflow)
    (folder / "my_training.py").write_text(STEPS + "\nsft_step = sequence_mean\n")
    monkeypatch.chdir(folder)
    assert run(capsys, *shlex.split(line))[0] == 0


def printed_after(start):
    """The indented lines of the page from this one on."""
    lines = DOCS[DOCS.index(f"    {start}") :].split("\n\n")[0].splitlines()
    return "\n".join(line[4:] for line in lines)


def test_the_reports_on_the_page_are_the_real_ones():
    def step(log_probs, mask, gradient_accumulation_steps, normalize_constant=1.0):
        loss = -(log_probs * mask).sum(dim=-1).mean() / normalize_constant / gradient_accumulation_steps
        loss.backward()
        return loss, {}

    def run_minibatch(model, microbatches):
        for microbatch in microbatches:
            log_probs = get_response_log_probs(model, microbatch["input_ids"], microbatch["labels"])["log_probs"]
            mask = microbatch["response_mask"]
            loss = -(log_probs * mask).sum() / mask.sum() / len(microbatches)
            loss.backward()

    assert str(audit_step(step)) == printed_after("step: sequence_mean")
    assert str(audit_accumulation(run_minibatch)) == printed_after("run_minibatch: not the full batch")


def test_the_page_lists_every_rule_and_every_problem_in_order():
    rows = re.findall(r"^\| `([\w-]+)` \|", DOCS, re.MULTILINE)
    tables = {"rules": list(KNOWN), "problems": list(PROBLEMS), "problems of loops": list(LOOP_PROBLEMS)}
    attributes, rows = rows[:6], rows[6:]
    assert attributes == ["rule", "formula", "problems", "details", "consequence", "ok"]
    assert rows == [code for table in tables.values() for code in table]
    for name, known in KNOWN.items():
        assert f"| `{name}` | {known.formula} |" in DOCS


@pytest.mark.parametrize(
    ("source", "name", "text"),
    [
        ("class T:\n    def step(self, lp, m, G): ...\n", "T.step", "T.step is a method"),
        ("def __getattr__(name):\n    raise RuntimeError('lazy')\n", "step", "RuntimeError: lazy"),
    ],
)
def test_what_cannot_be_a_step_is_not_called(folder, capsys, source: str, name: str, text: str):
    (folder / "odd.py").write_text(source)
    status, out, err = run(capsys, "audit", f"{folder / 'odd.py'}:{name}")
    assert status == 2
    assert text in out + err
