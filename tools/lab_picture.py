"""The picture of a lab in the README, taken from the real thing: `python tools/lab_picture.py docs/step_lab.png`."""

import argparse
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from run_notebooks import METADATA

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from browser.lab_page import LabPage, chromium_page, lab_server

CODE = """
from sft_edu.widgets import StepLab

lab = StepLab.from_state("G=4 c=1 rule=notes mask=1101/1111")
lab
"""
WIDTH = 1120  # pixels of the window: the least in which the six steps stand in one row
SHARPNESS = 2  # drawn larger than shown, for screens with small pixels


def take(picture: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = new_notebook(cells=[new_code_cell(CODE.strip())], metadata=METADATA)
        nbformat.write(notebook, Path(folder) / "lab.ipynb")
        with lab_server(Path(folder)) as server, chromium_page(WIDTH, SHARPNESS) as page:
            lab = LabPage(page, server)
            lab.open("lab.ipynb")
            lab.theme("light")
            lab.command("application:toggle-left-area")
            lab.run_all()
            if problems := lab.errors() + lab.console_errors:
                raise SystemExit("\n".join(problems))
            page.set_viewport_size({"width": WIDTH, "height": 1400})  # all of the lab at once
            page.wait_for_timeout(1000)
            page.locator(".jp-OutputArea-output").first.screenshot(path=picture)
    Image.open(picture).quantize().save(picture, optimize=True)  # few colours: half of the bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Photograph a lab for the README.")
    parser.add_argument("picture", type=Path)
    take(parser.parse_args().picture)
