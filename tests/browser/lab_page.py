"""Lessons in a real JupyterLab: a server, a Chromium page, and what the tests and a curious author do with them.

    python tests/browser/lab_page.py notebooks/02_one_step.ipynb --out shots --theme dark

runs a notebook and stores a picture of every screenful of it.
"""

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1000  # playwright counts in milliseconds

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What Jupyter and anywidget put where a widget or an output should be.
BROKEN_OUTPUT = (
    "Error displaying widget",
    "Error creating widget",
    "Error rendering output item",
    "Javascript Error",
    "Loading widget...",
)

# Chromium's own record of what moved without being touched. What grew in its place has not jumped; what moved sideways
# is an axis that follows its numbers.
WATCH_JUMPS = """() => {
  window.jumps = [];
  window.jumpObserver?.disconnect();
  window.jumpObserver = new PerformanceObserver((list) => {
    for (const { sources } of list.getEntries())
      for (const { node, previousRect: old, currentRect: now } of sources) {
        const element = node?.nodeType === Node.TEXT_NODE ? node.parentElement : node;
        if (element?.closest('.jp-Cell-inputArea, .jp-OutputArea-output')
            && old.height === now.height && Math.abs(now.y - old.y) >= 2)
          window.jumps.push(`${node.textContent.trim().slice(0, 60)}: from ${old.y} to ${now.y} px`);
      }
  });
  window.jumpObserver.observe({ type: 'layout-shift' });
}"""


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Server:
    url: str
    token: str
    folder: Path

    def get(self, path: str) -> int:
        """The HTTP status of a page."""
        with urllib.request.urlopen(f"{self.url}{path}?token={self.token}", timeout=10) as answer:
            return answer.status


@contextmanager
def lab_server(notebooks: Path) -> Iterator[Server]:
    """JupyterLab on a copy of a folder, with nobody's settings but ours; gone, kernels included, at the end."""
    with tempfile.TemporaryDirectory(prefix="sft_edu_lab_", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        shutil.copytree(notebooks, home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copytree(ROOT / "sft_edu" / "jupyter_settings", home / "settings")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = Server(f"http://127.0.0.1:{port}", secrets.token_hex(), home / "notebooks")
        options = {
            "IdentityProvider.token": server.token,
            "LabApp.app_settings_dir": home / "no_other_settings",
            "LabApp.expose_app_in_browser": True,
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": server.folder,
        }
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
        command += [f"--{name}={value}" for name, value in options.items()]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
        # The library must be found from the copy too, installed or not.
        path = os.pathsep.join(filter(None, [str(ROOT), outside.get("PYTHONPATH")]))
        ours = {
            "HOME": folder,
            "JUPYTER_CONFIG_DIR": f"{folder}/settings",
            "IPYTHONDIR": f"{folder}/ipython",
            "PYTHONPATH": path,
        }
        log = home / "server.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, env=outside | ours, cwd=folder, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        try:
            _wait_for(server, process, log)
            yield server
        finally:
            _stop(process)


def _wait_for(server: Server, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.get("/api/status") == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


def _stop(process: subprocess.Popen) -> None:
    # Kernels run in process groups of their own, so they are remembered before their parent goes.
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for orphan in left:
        orphan.kill()


@contextmanager
def chromium_page(width: int = 1280, sharpness: float = 1) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        try:
            yield browser.new_page(viewport={"width": width, "height": 720}, device_scale_factor=sharpness)
        finally:
            browser.close()


class LabPage:
    """One browser page on one server, spoken to through JupyterLab's own commands."""

    def __init__(self, page: Page, server: Server):
        self.page = page
        self.server = server
        self.console_errors: list[str] = []
        page.on("console", lambda message: message.type == "error" and self._complain(message.text))
        page.on("pageerror", lambda error: self._complain(str(error)))

    def _complain(self, text: str) -> None:
        self.console_errors.append(text)

    def command(self, name: str, **arguments: object) -> None:
        script = "async ([name, args]) => { await window.jupyterapp.commands.execute(name, args) }"
        self.page.evaluate(script, [name, arguments])

    def open(self, notebook: str) -> None:
        """Open a notebook, named relative to the server's folder, and wait for its kernel."""
        self.page.goto(f"{self.server.url}/lab/tree/{notebook}?reset&token={self.server.token}")
        self.page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden)", timeout=60 * SECONDS)
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=60 * SECONDS,
        )
        self.console_errors.clear()  # what Lab says about itself while it loads is not the lesson's

    def run_all(self, seconds: float = 120) -> None:
        """Run every cell from a clean slate, and wait until all have run or one has failed."""
        self.command("notebook:clear-all-cell-outputs")  # stored counts would look like finished cells
        self.command("notebook:run-all-cells")
        self.page.wait_for_function(
            """() => {
              const panel = window.jupyterapp.shell.currentWidget;
              const cells = panel.content.model.toJSON().cells
                .filter(cell => cell.cell_type === 'code' && String(cell.source).trim());
              const failed = cells.some(cell => cell.outputs.some(output => output.output_type === 'error'));
              return panel.sessionContext.session.kernel.status === 'idle'
                && (failed || cells.every(cell => cell.execution_count !== null));
            }""",
            timeout=seconds * SECONDS,
        )
        self.page.wait_for_timeout(300)  # widgets draw after the kernel is idle

    def outputs(self) -> list[dict]:
        cells = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")
        return [output for cell in cells for output in cell.get("outputs", [])]

    def errors(self) -> list[str]:
        """Exceptions in cells, and texts that stand where an output should."""
        raised = [f"{o['ename']}: {o['evalue']}" for o in self.outputs() if o["output_type"] == "error"]
        shown = self.page.locator(".jp-Notebook").first.inner_text()
        return raised + [text for text in BROKEN_OUTPUT if text in shown]

    def watch_jumps(self) -> None:
        self.page.evaluate(WATCH_JUMPS)

    def jumps(self) -> list[str]:
        """What jumped up or down since the last time, or since `watch_jumps`."""
        self.page.wait_for_timeout(100)  # records come after the frame that they are about
        return self.page.evaluate("() => window.jumps.splice(0)")

    def scroll_through(self) -> None:
        """Have every part of the notebook on the screen for a moment."""
        for _ in self._screenfuls():
            self.page.wait_for_timeout(100)

    def theme(self, name: str) -> None:
        """Switch to "light" or "dark"."""
        lab_name = f"JupyterLab {name.capitalize()}"
        self.command("apputils:change-theme", theme=lab_name)
        self.page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=lab_name)
        self.page.wait_for_timeout(500)  # the new style sheet is still being applied

    def screenshots(self, folder: Path, name: str) -> list[Path]:
        """A picture of every screenful of the notebook, from top to bottom."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for _ in self._screenfuls():
            self.page.wait_for_timeout(200)
            paths.append(folder / f"{name}_{len(paths):02}.png")
            self.page.screenshot(path=paths[-1])
        return paths

    def _screenfuls(self) -> Iterator[int]:
        """Scroll from top to bottom; yields the place after each move."""
        scroller = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer")
        # Lab lets one scroll past the end; the pictures stop at the last cell.
        height, end = scroller.evaluate(
            """box => [box.clientHeight, box.scrollTop - box.getBoundingClientRect().top
              + Math.max(...[...box.querySelectorAll('.jp-Cell')].map(c => c.getBoundingClientRect().bottom))]"""
        )
        for top in range(0, round(end), height):
            scroller.evaluate("(box, top) => { box.scrollTop = top }", top)
            yield top

    def close(self) -> None:
        """Shut the kernel down and leave the page; kernels that hold torch would fill the memory."""
        self.page.evaluate("async () => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.goto("about:blank")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a notebook in JupyterLab and photograph it.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--wide", action="store_true", help="fold the file browser away")
    choice = parser.parse_args()
    with lab_server(choice.notebook.parent) as server, chromium_page(choice.width) as page:
        lab = LabPage(page, server)
        lab.open(choice.notebook.name)
        lab.theme(choice.theme)
        if choice.wide:
            lab.command("application:toggle-left-area")
        lab.run_all()
        problems = lab.errors() + lab.console_errors
        pictures = lab.screenshots(choice.out, f"{choice.notebook.stem}_{choice.theme}")
    print(*pictures, sep="\n")
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
