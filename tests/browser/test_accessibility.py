"""What axe-core, a checker of accessibility, finds in the labs and in a prediction."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator
from run_notebooks import METADATA

from .lab_page import LabPage

AXE = "axe-core@4.10.3"
SETUP = """
from sft_edu.widgets import AccumulationLab, MaskLab, Prediction, ScalingLab, StepLab, TrainingLab
"""
VIEWS = {
    "MaskLab": 'MaskLab(["Q: 1+1?", "Say ok."], ["2", "ok"])',
    "StepLab": "StepLab()",
    "AccumulationLab": "AccumulationLab()",
    "ScalingLab": "ScalingLab()",
    "TrainingLab": "lab = TrainingLab()\nlab.run(1)\nlab",
    "Prediction": 'Prediction("Which loss?", ["0.4000", "0.7000"], "0.7000", "It is divided by G twice.")',
}
RUN = """
async element => {
  const found = await axe.run(element, { resultTypes: ['violations'] });
  if (!found.passes.length) throw new Error('nothing to check');
  return found.violations
    .filter(violation => ['serious', 'critical'].includes(violation.impact))
    .flatMap(({ id, nodes }) => nodes.map(node => [id, node.html, node.failureSummary]));
}
"""


def give_up(reason: str) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checker's script, as npm has it."""
    npm = shutil.which("npm")
    if npm is None:
        give_up("npm is missing; on Debian and Ubuntu: sudo apt-get install npm")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--prefix", str(folder), "--no-save", "--ignore-scripts", "--prefer-offline", AXE]
    install = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90)
    if install.returncode:
        give_up(f"npm could not install {AXE}: {install.stderr[-300:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def outputs(lab: LabPage, axe: str) -> Iterator[dict[str, Locator]]:
    cells = [new_code_cell(source.strip()) for source in (SETUP, *VIEWS.values())]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.server.folder / "accessibility.ipynb")
    lab.open("accessibility.ipynb")
    lab.run_all()
    lab.page.evaluate(axe)
    cells = lab.page.locator(".jp-CodeCell")
    yield {name: cells.nth(index + 1).locator(".jp-OutputArea-output").first for index, name in enumerate(VIEWS)}
    lab.theme("light")
    lab.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", VIEWS)
def test_axe_finds_nothing_serious(lab: LabPage, outputs: dict[str, Locator], name: str, theme: str):
    if lab.page.evaluate("document.body.dataset.jpThemeName") != f"JupyterLab {theme.capitalize()}":
        lab.theme(theme)
    outputs[name].scroll_into_view_if_needed()
    found = outputs[name].evaluate(RUN)
    assert not found, "\n".join(f"{rule}: {html}\n    {why}" for rule, html, why in found)
