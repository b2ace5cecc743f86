"""Run notebooks in place and store them clean: `python tools/run_notebooks.py notebooks/*.ipynb`.

A stored lesson holds what the tests compare and what a reader sees before running it, and nothing that
changes from machine to machine: no timings, no Python version, no widget state.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# The whole metadata of a lesson. Jupyter needs a kernel with a display name; this is the one it writes itself.
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# A stored view points to a model that died with its kernel: Jupyter would show an error box in its place.
# Without it Jupyter shows the widget's text, and the live widget once the cell runs.
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop, in place, everything a stored lesson must not hold."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            kept["jupyter"] = {"source_hidden": True}  # a question hides the code that knows its answer
        cell.metadata = nbformat.from_dict(kept)
        for output in cell.get("outputs", []):
            if "data" in output:
                output.metadata = nbformat.from_dict({})
                output.data.pop(WIDGET_VIEW, None)
    return notebook


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=60,  # seconds for a cell, as in the tests
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nbformat.validate(clean(notebook))
    # Only a run that reached its end replaces the file.
    written = path.with_suffix(".tmp")
    nbformat.write(notebook, written)
    written.replace(path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        run(Path(name))
