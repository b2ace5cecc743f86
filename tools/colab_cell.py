"""Put the cell that installs sft_edu in Google Colab into notebooks: `python tools/colab_cell.py notebooks/*.ipynb`.

It is the first code cell, hidden, and does nothing anywhere else. Counts of the cells below it move up by one, so that
nothing has to run again.
"""

import sys
from pathlib import Path

import nbformat

TAG = "colab"
# JupyterLab shows the first line of a hidden cell, and a longer one makes a narrow page scroll sideways.
SOURCE = """\
# In Google Colab this cell installs sft_edu.
# Anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    from google.colab import output

    source = input("Address of the git repository this lesson came from: ").strip()
    get_ipython().run_line_magic("pip", f"install --quiet 'sft-edu[lab] @ git+{source}'")
    output.enable_custom_widget_manager()"""


def add(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Insert the cell, in place, below the opening text; or renew it where it is. Without code, nothing needs it."""
    if not any(cell.cell_type == "code" for cell in notebook.cells):
        return notebook
    old = next((cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])), None)
    if old is not None:
        old.source = SOURCE
        return notebook
    cell = nbformat.v4.new_code_cell(
        SOURCE, id="cell-colab", execution_count=1, metadata={"tags": [TAG], "jupyter": {"source_hidden": True}}
    )
    for later in notebook.cells:
        if later.get("execution_count"):  # it has run
            later.execution_count += 1
            for result in later.outputs:
                if result.output_type == "execute_result":
                    result.execution_count += 1
    notebook.cells.insert(1, cell)
    return notebook


if __name__ == "__main__":
    everything = sorted(Path(__file__).parents[1].glob("notebooks/**/[!.]*.ipynb"))
    for name in sys.argv[1:] or everything:
        path = Path(name)
        notebook = add(nbformat.read(path, as_version=4))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
