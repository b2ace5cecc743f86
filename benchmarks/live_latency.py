"""How soon a picture follows the hand: `StepLab` against `interact` with a new figure per event.

Both run at the same time in one JupyterLab, each in its own page and kernel, and take turns under the same keys. A
latency is the time from an input event in the page to the frame that shows its answer.
"""

import argparse
import ast
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))

from lab_page import SECONDS, LabPage, Server, chromium_page, find_chromium, lab_server  # noqa: E402

# What most people write: the step in seven lines, the gradient as a heat map, the six values as bars. Each number can
# be read, as in StepLab.
INTERACT = """
import matplotlib.pyplot as plt
import torch
from ipywidgets import interact

shown = []

def show(G=2):
    log_probs = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    num_tokens = mask.sum()
    masked_sum = (log_probs * mask).sum() / 1.0
    loss = -masked_sum / G
    scaled_loss = loss / G
    scaled_loss.backward()
    returned_loss = scaled_loss.detach()
    names = ["num_tokens", "masked_sum", "loss", "scaled_loss", "backward", "returned_loss"]
    values = [num_tokens, masked_sum, loss, scaled_loss, log_probs.grad.min(), returned_loss]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    image = left.imshow(log_probs.grad, cmap="PuOr", vmin=-1, vmax=1)
    for row in range(2):
        for column in range(4):
            left.text(column, row, f"{log_probs.grad[row, column]:.4f}", ha="center", va="center")
    figure.colorbar(image, ax=left)
    right.bar_label(right.bar(names, [float(value) for value in values]), fmt="%.4f")
    right.tick_params(axis="x", rotation=30)
    right.set_title(f"G = {G}")
    plt.show()
    shown.append(G)

interact(show, G=(1, 32));
"""
STEP_LAB = """
from sft_edu.widgets import StepLab
lab = StepLab()
lab
"""
PAUSE = 0.15  # seconds from a picture to the next single key, which then finds page and kernel at rest
FRAME = 1000 / 60  # milliseconds
PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
# Resident memory, comms, and figures that are still there.
LEFT_IN_KERNEL = """
def left():
    import gc, sys, psutil
    gc.collect()
    figure = sys.modules["matplotlib.figure"].Figure
    figures = sum(isinstance(thing, figure) for thing in gc.get_objects())
    return psutil.Process().memory_info().rss, len(get_ipython().kernel.comm_manager.comms), figures
"""
# Notes when events come and when their answers are painted.
WATCH = """
() => {
  const output = [...document.querySelectorAll('.jp-CodeCell')].at(-1).querySelector('.jp-OutputArea');
  const notes = { events: [], pictures: [], numbers: [], stages: [], chips: [] };
  const waiting = [];
  const note = kind => requestAnimationFrame(now => {
    notes[kind].push(performance.now());
    waiting.filter(one => notes[one.kind].length >= one.count).forEach(one => one.done());
  });
  const seen = (target, options, kind) => target && new MutationObserver(() => note(kind)).observe(target, options);
  for (const name of ['keydown', 'pointerdown']) {
    output.addEventListener(name, () => notes.events.push(performance.now()), { capture: true });
  }
  seen(output.querySelector('.widget-readout'), { childList: true, characterData: true, subtree: true }, 'numbers');
  seen(output.querySelector('.sft-edu-chip'), { attributeFilter: ['aria-pressed'] }, 'chips');
  const chain = output.querySelector('.sft-edu-chain');
  if (chain) {
    const loss = [...chain.querySelectorAll('.sft-edu-chain-value')].at(-1);
    seen(loss, { childList: true, characterData: true, subtree: true }, 'stages'); // once: the kernel gives the same
    seen(chain, { attributeFilter: ['data-drawn'] }, 'pictures');
  } else {
    new MutationObserver(changes => {
      for (const node of changes.flatMap(change => [...change.addedNodes])) {
        const image = node.nodeName === 'IMG' ? node : node.querySelector?.('img');
        if (image?.complete) note('pictures');
        else image?.addEventListener('load', () => note('pictures'));
      }
    }).observe(output, { childList: true, subtree: true });
  }
  window.bench = {
    take: () => Object.fromEntries(Object.keys(notes).map(kind => [kind, notes[kind].splice(0)])),
    count: kind => notes[kind].length,
    painted: (kind, count) => new Promise(done => {
      if (notes[kind].length >= count) done();
      else waiting.push({ kind, count, done });
    }),
  };
}
"""


@dataclass
class Way:
    """One way to do the work, in a page of its own, and what was measured of it."""

    name: str
    lab: LabPage
    renderer: psutil.Process
    latencies: list[float] = field(default_factory=list)
    first_paints: dict[str, list[float]] = field(default_factory=lambda: {"number": [], "stages": [], "chip": []})
    painted: list[int] = field(default_factory=list)
    settled: list[float] = field(default_factory=list)
    last_shown: list[bool] = field(default_factory=list)
    updates: int = 0
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()

    @property
    def output(self):
        return self.lab.page.locator(".jp-CodeCell").last.locator(".jp-OutputArea").first

    def kernel(self, code: str, wanted: str = "None") -> object:
        script = """async ([code, wanted]) => {
          const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
          const request = { code, user_expressions: { wanted }, store_history: false };
          return (await kernel.requestExecute(request).done).content.user_expressions;
        }"""
        return ast.literal_eval(self.lab.page.evaluate(script, [code, wanted])["wanted"]["data"]["text/plain"])

    def press(self, count: int, pause: float = 0) -> dict[str, list[float]]:
        """Arrow keys one by one, each after the picture of the one before and a pause. They go back and forth."""
        page = self.lab.page
        self.output.locator(".noUi-handle").first.focus()
        page.evaluate("bench.take()")
        for index in range(count):
            time.sleep(pause)
            page.keyboard.press("ArrowLeft" if index % 2 else "ArrowRight")
            page.evaluate("count => bench.painted('pictures', count)", index + 1)
        return page.evaluate("bench.take()")

    def measure_keys(self, count: int) -> None:
        notes = self.press(count, PAUSE)
        self.latencies += _differences(notes["events"], notes["pictures"])
        self.first_paints["number"] += _differences(notes["events"], notes["numbers"])
        if notes["stages"]:
            self.first_paints["stages"] += _differences(notes["events"], notes["stages"])

    def measure_chip(self, count: int) -> None:
        page = self.lab.page
        self.output.locator(".sft-edu-chip").first.hover()
        for _ in range(count):
            page.evaluate("bench.take()")
            time.sleep(PAUSE)
            page.mouse.down()
            page.mouse.up()
            page.evaluate("bench.painted('chips', 1)")
            page.evaluate("bench.painted('pictures', 1)")
            notes = page.evaluate("bench.take()")
            self.first_paints["chip"] += _differences(notes["events"], notes["chips"])

    def measure_burst(self, events: int = 60, seconds: float = 1.0) -> None:
        """As many keys in a second, up and then down, no matter what is painted."""
        page = self.lab.page
        handle = self.output.locator(".noUi-handle").first
        handle.focus()
        page.evaluate("bench.take()")
        start = time.perf_counter()
        for index in range(events):
            page.keyboard.press("ArrowRight" if index < events / 2 else "ArrowLeft")
            time.sleep(max(0.0, start + (index + 1) * seconds / events - time.perf_counter()))
        count = -1
        while count != (count := page.evaluate("bench.count('pictures')")):
            page.wait_for_timeout(1 * SECONDS)
        notes = page.evaluate("bench.take()")
        self.painted.append(count)
        self.settled.append(notes["pictures"][-1] - notes["events"][-1])
        self.last_shown.append(self._shown() == round(float(handle.get_attribute("aria-valuenow"))))

    def _shown(self) -> int:
        """The G of the picture: ours says it on the page; the other's is known to the kernel that drew it."""
        if self.output.locator(".sft-edu-chain").count():
            return int(self.output.get_by_label("state").input_value().split()[0].removeprefix("G="))
        return self.kernel("", "shown[-1]")

    def left(self) -> tuple[float, ...]:
        """Megabytes of the kernel and of the page, as the browser leaves it, DOM nodes, comms and figures."""
        kernel, comms, figures = self.kernel(LEFT_IN_KERNEL, "left()")
        nodes = self.lab.page.evaluate("document.querySelectorAll('*').length")
        return kernel / 2**20, self.renderer.memory_info().rss / 2**20, nodes, comms, figures


def _differences(starts: list[float], ends: list[float]) -> list[float]:
    return [end - start for start, end in zip(starts, ends, strict=True)]


def _renderers() -> dict[int, psutil.Process]:
    return {p.pid: p for p in psutil.Process().children(recursive=True) if "--type=renderer" in " ".join(_command(p))}


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def way(name: str, code: str, server: Server, new_page: Callable, others: list[Way]) -> Iterator[Way]:
    file = f"{name.split()[0].lower()}.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(code.strip())], metadata=PYTHON), server.folder / file)
    lab = LabPage(new_page(), server)
    lab.open(file)
    lab.run_all()
    # Chromium keeps empty renderers in reserve; the one that holds JupyterLab is by far the largest.
    new = [p for pid, p in _renderers().items() if pid not in [other.renderer.pid for other in others]]
    one = Way(name, lab, max(new, key=lambda process: process.memory_info().rss))
    lab.page.evaluate(WATCH)
    one.press(6)  # fonts, first use of code, caches
    try:
        yield one
    finally:
        lab.close()


def measure(ours: Way, theirs: Way, keys: int, bursts: int, updates: int, their_updates: int) -> None:
    for _ in range(4):  # in turns, so that a busy machine is unkind to both
        for one in (ours, theirs):
            one.measure_keys(keys // 4)
        ours.measure_chip(keys // 8)
    for _ in range(bursts):
        for one in (ours, theirs):
            one.measure_burst()
    for one in (ours, theirs):
        one.before = one.left()
    for _ in range(4):
        for one, count in ((ours, updates // 4), (theirs, their_updates // 4)):
            one.press(count)
            one.updates += count
    for one in (ours, theirs):
        one.after = one.left()


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def report(ours: Way, theirs: Way) -> None:
    ways = (theirs, ours)
    rows = [
        ("key to picture, median ms", *(f"{statistics.median(one.latencies):.0f}" for one in ways)),
        ("key to picture, p95 ms", *(f"{p95(one.latencies):.0f}" for one in ways)),
    ]
    for kind in ("number", "stages", "chip"):
        paints = [one.first_paints[kind] for one in ways]
        rows.append(
            (
                f"first paint, {kind}, median / p95 ms",
                *(f"{statistics.median(p):.0f} / {p95(p):.0f}" if p else "-" for p in paints),
            )
        )
    rows += [
        ("60 keys in a second: pictures", *(f"{statistics.median(one.painted):.0f}" for one in ways)),
        ("  last key to last picture, ms", *(f"{statistics.median(one.settled):.0f}" for one in ways)),
        ("  the last key is the one shown", *("yes" if all(one.last_shown) else "NO" for one in ways)),
        ("then updates", *(str(one.updates) for one in ways)),
    ]
    for index, what in enumerate(("kernel MB", "page MB", "DOM nodes", "comms", "figures")):
        rows.append((f"  growth, {what}", *(f"{one.after[index] - one.before[index]:+.0f}" for one in ways)))
    for name, *cells in [("", *(one.name for one in ways)), *rows]:
        print(f"{name:<40}" + "".join(f"{cell:>24}" for cell in cells))
    print()
    reference = statistics.median(theirs.latencies)
    first = max(statistics.median(paints) for paints in ours.first_paints.values())
    goal("key to picture", statistics.median(ours.latencies) / reference, 6)
    goal("settled after a burst", statistics.median(ours.settled) / statistics.median(theirs.settled), 4)
    goal("first paint under the finger", first / reference, 20)
    print(f"It takes {first:.0f} ms; the page has a frame every {FRAME:.0f} ms.")


def goal(name: str, ratio: float, part: int) -> None:
    verdict = "met" if ratio <= 1 / part else "MISSED"
    print(f"{name}: 1/{1 / ratio:.1f} of interact, goal 1/{part}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer keys and updates")
    parser.add_argument("--updates", type=int, default=1000, help="for the growth of StepLab")
    parser.add_argument("--their-updates", type=int, default=1000, help="for the growth of interact")
    choice = parser.parse_args()
    if find_chromium() is None:
        print("skipped: Chromium is missing; on Debian and Ubuntu: sudo apt-get install chromium")
        return
    with ExitStack() as stack:
        empty = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(lab_server(empty))
        browser = stack.enter_context(chromium_page()).context.browser

        def new_page():
            return browser.new_context(viewport={"width": 1280, "height": 720}).new_page()

        ours = stack.enter_context(way("StepLab()", STEP_LAB, server, new_page, []))
        theirs = stack.enter_context(way("interact, new figure", INTERACT, server, new_page, [ours]))
        if choice.quick:
            measure(ours, theirs, keys=16, bursts=1, updates=80, their_updates=16)
        else:
            measure(ours, theirs, 40, 3, choice.updates, choice.their_updates)
        report(ours, theirs)
        if errors := ours.lab.errors() + theirs.lab.errors():
            raise RuntimeError(errors)


if __name__ == "__main__":
    main()
