"""A lab that follows a hand for a long time keeps nothing of what it has shown."""

import ast

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from run_notebooks import METADATA

from .lab_page import SECONDS, LabPage

UPDATES = 200
LAB = """
from sft_edu.widgets import StepLab
lab = StepLab()
lab"""
LEFT = """async () => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const wanted = 'len(get_ipython().kernel.comm_manager.comms)';
  const request = { code: '', user_expressions: { wanted }, store_history: false };
  const reply = await kernel.requestExecute(request).done;
  const output = document.querySelector('.jp-CodeCell .jp-OutputArea');
  return [output.querySelectorAll('*').length, reply.content.user_expressions.wanted.data['text/plain']];
}"""


def test_updates_leave_no_nodes_and_no_comms(lab: LabPage):
    notebook = new_notebook(cells=[new_code_cell(LAB.strip())], metadata=METADATA)
    nbformat.write(notebook, lab.server.folder / "updates.ipynb")
    lab.open("updates.ipynb")
    lab.run_all()
    page = lab.page
    page.locator(".jp-CodeCell .noUi-handle").first.focus()
    drawn = int(page.locator(".sft-edu-chain").get_attribute("data-drawn"))

    def press(key: str) -> None:
        nonlocal drawn
        drawn += 1
        page.keyboard.press(key)
        page.wait_for_function(
            "drawn => document.querySelector('.sft-edu-chain').dataset.drawn === drawn",
            arg=str(drawn),
            timeout=10 * SECONDS,
        )

    for key in ("ArrowRight", "ArrowLeft"):
        press(key)
    nodes, comms = page.evaluate(LEFT)
    for _ in range(UPDATES // 2):
        press("ArrowRight")
        press("ArrowLeft")
    assert page.evaluate(LEFT) == [nodes, comms]
    assert ast.literal_eval(comms) > 0
    assert lab.console_errors == []
    lab.close()
