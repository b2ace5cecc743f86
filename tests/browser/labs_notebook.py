"""One notebook with all labs, and whether its page says what its kernel says."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect
from run_notebooks import METADATA

from .lab_page import LabPage
from .test_live_views_in_lab import kernel

LABS = {
    "mask": 'MaskLab(["2+2? "], ["4"])',
    "step": "StepLab()",
    "accumulation": "AccumulationLab()",
    "scaling": "ScalingLab()",
    "optimizer": "OptimizerLab()",
    "ranks": "RanksLab()",
}
SETUP = "from sft_edu.widgets import *"
# The small text beside a bar, from the cells of its line in the table.
BESIDE_BAR = {
    "scaling": lambda formula, length, cosine, *_: f"D = {formula}, cosine {cosine} {length}",
    "optimizer": lambda length, cosine, *_: "cosine {2}; length predicted {1} {0}".format(
        *re.fullmatch(r"(\S+) \((\S+)\)", length).groups(), cosine.split()[0]
    ),
}
CHIP = re.compile(
    r"sequence (\d+), token (\d+): .+, (?:prompt|response|eos|padding), mask ([01]), gradient (\S+), log p (\S+)"
)
STAGE = re.compile(r"(num_tokens|masked_sum|loss|scaled_loss|gradient) (-?\d\S*?)(?:,|\s)")


class Labs:
    """The open notebook; each lab is a variable of the kernel by its name here."""

    def __init__(self, lab: LabPage, threads: str):
        self.lab, self.page, self.threads = lab, lab.page, threads

    def output(self, name: str) -> Locator:
        cell = self.page.locator(".jp-CodeCell").nth(1 + list(LABS).index(name))
        return cell.locator(".jp-OutputArea-output").first

    def ask(self, wanted: str, code: str = "None") -> object:
        """A value of the kernel, as a literal."""
        return kernel(self.lab, code, wanted)

    def told(self, name: str, wanted: str) -> object:
        """Values of a lab while nothing changes it: a hand's change is worked on by another thread."""
        return self.ask("told", f"lab = {name}\nwith lab._lock:\n    told = {wanted}")

    def settle(self, wanted: str, value: object) -> None:
        """Wait until the kernel has taken what a hand did."""
        until(lambda: self.ask(wanted) == value, lambda: f"{wanted}: {self.ask(wanted)!r}, not {value!r}")

    def agree(self, name: str, asked: bool = False) -> None:
        """All that the page says of a lab is what the kernel's lab says in its text.

        What is read out is the words, or the step that was asked for last.
        """
        state, text, words = self.told(name, "lab.state, repr(lab), lab.words()")
        output = self.output(name)
        expect(output.get_by_label("state")).to_have_value(state)
        expect(output.locator(".sft-edu-words").first).to_have_text(words)
        heard = re.compile(r"^\d \w+\. ") if asked else words
        expect(output.locator(".sft-edu-words + .sft-edu-live").first).to_have_text(heard)
        flat = " ".join(text.split())
        if name in ("mask", "step"):
            self._agree_on_the_step(name, flat)
        elif name == "accumulation":
            self._agree_on_the_fill(flat)
        elif name == "ranks":
            self._agree_on_the_ranks(text)
        else:
            self._agree_on_the_table(name, text)

    def _agree_on_the_step(self, name: str, text: str) -> None:
        output, numbers = self.output(name), dict(STAGE.findall(text))
        assert len(numbers) == 5, text
        numbers = {"returned_loss": numbers["scaled_loss"], "backward": numbers.pop("gradient"), **numbers}
        for stage, number in numbers.items():
            box = output.get_by_role("button", name=re.compile(rf"^\d {stage}\b"))
            expect(box).to_have_accessible_name(re.compile(rf" {re.escape(number)}( or 0)?$"))
        mask, gradient, log_probs = self.told(name, "lab.mask, lab.gradient.tolist(), lab.log_probs")
        kernel_says = [
            (row, column, bit, gradient[row][column], log_probs[row][column])
            for row, bits in enumerate(mask)
            for column, bit in enumerate(bits)
        ]
        until(
            lambda: (
                [chip[:3] for chip in self.chips(name)] == [chip[:3] for chip in kernel_says]
                and all(
                    same == pytest.approx(other, abs=5e-5)
                    for ours, theirs in zip(self.chips(name), kernel_says, strict=True)
                    for same, other in zip(ours[3:], theirs[3:], strict=True)
                )
            ),
            lambda: f"{self.chips(name)}, not {kernel_says}",
        )

    def chips(self, name: str) -> list[tuple[int, int, int, float, float]]:
        """Row, position, mask, gradient and log-prob of each token, as its label says them."""
        found = self.output(name).evaluate(
            """output => [...output.querySelectorAll('.sft-edu-mask-grid button')]
              .map(chip => [chip.getAttribute('aria-label'), chip.getAttribute('aria-pressed')])"""
        )
        said = []
        for label, pressed in found:
            row, column, bit, gradient, log_prob = CHIP.fullmatch(label).groups()
            assert pressed == ("true" if bit == "1" else "false"), label
            said.append((int(row), int(column), int(bit), float(gradient), float(log_prob)))
        return said

    def _agree_on_the_fill(self, text: str) -> None:
        length, direction = re.search(r"length (\S+x), (.+?)\. ", text).groups()
        played, steps = re.search(r"G=(\d+) .*played=(\d+)", text).groups()[::-1]
        gradient, memory = self.output("accumulation").get_by_role("table").all()
        first = gradient.get_by_role("row").first
        expect(first).to_have_accessible_name(f".grad after {played} of {steps} {direction} {length}")
        share = re.search(r"backward: (\S+) of", text)[1]
        expect(memory.get_by_role("row")).to_have_count(2)

        def shown() -> str:
            one, whole = [int(cell.replace(",", "")) for cell in memory.get_by_role("cell").all_inner_texts()]
            return f"{one / whole:.2f}"

        until(lambda: shown() == share, lambda: f"{shown()}, not {share}")

    def _agree_on_the_ranks(self, text: str) -> None:
        every, followed = self.output("ranks").get_by_role("table").all()
        for index, line in enumerate(text.splitlines()[2:6]):
            name, formula, off, length, cosine = re.split(r"\s{2,}", line)
            row = every.get_by_role("row").nth(index)
            choice = ", followed below" if f"denominator={name}" == text.split()[4] else ""
            expect(row).to_have_accessible_name(f"{name}{choice} D = {formula}, length {length}, cosine {cosine} {off}")
        followed_rows = self.told("ranks", "[[r['label'], r['note'], r['text']] for r in lab._rows_by_world()]")
        expect(followed.get_by_role("row")).to_have_count(len(followed_rows))
        for index, cells in enumerate(followed_rows):
            expect(followed.get_by_role("row").nth(index)).to_have_accessible_name(" ".join(filter(None, cells)))

    def _agree_on_the_table(self, name: str, text: str) -> None:
        bars, table = self.output(name).get_by_role("table").all()
        rows = bars.get_by_role("row")
        expect(table.get_by_role("row")).to_have_count(rows.count() + 1)
        head, *lines = [re.split(r"\s{2,}", line) for line in text.splitlines()[1 : rows.count() + 2]]
        expect(table.get_by_role("columnheader")).to_have_text(head)
        for index, (label, *cells) in enumerate(lines):
            expect(rows.nth(index)).to_have_accessible_name(f"{label} {BESIDE_BAR[name](*cells)}")
            expect(table.get_by_role("rowheader").nth(index)).to_have_text(label)
            expect(table.get_by_role("row").nth(index + 1).get_by_role("cell")).to_have_text(cells)


def until(is_true: Callable[[], bool], complaint: Callable[[], str], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.05)


@contextmanager
def labs_notebook(lab: LabPage, threads: str = "perCommTarget") -> Iterator[Labs]:
    """Threads: JupyterLab's own setting for messages of widgets, and a name for it."""
    cells = [new_code_cell(SETUP), *(new_code_cell(f"{name} = {make}\n{name}") for name, make in LABS.items())]
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), lab.server.folder / "all_labs.ipynb")
    lab.open("all_labs.ipynb")
    lab.page.evaluate("mode => { window.jupyterapp.serviceManager.kernels.commsOverSubshells = mode }", threads)
    lab.run_all()
    yield Labs(lab, threads)
    assert lab.errors() == []
    assert lab.console_errors == []
    lab.close()
