"""Is this machine ready for the lessons? Each finding is one line, and says what to do where it is not fine."""

from __future__ import annotations

import os
import re
import shutil
import sys
import webbrowser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "sft-edu"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        found: its version or state.
        advice: what to do; empty where it is fine.
        needed: whether the lessons fail without it.
    """

    name: str
    found: str
    advice: str = ""
    needed: bool = True

    @property
    def fine(self) -> bool:
        return not (self.advice and self.needed)

    def __str__(self) -> str:
        mark = "ok  " if not self.advice else "note" if not self.needed else "NO  "
        line = f"{mark}  {self.name:<12} {self.found}"
        return f"{line}\n{'':<19}{self.advice}" if self.advice else line


def pip_line(what: str = "sft-edu[lab]") -> str:
    """The line that installs something for the Python that runs now."""
    return f'{sys.executable} -m pip install "{what}"'


def missing_packages() -> list[str]:
    """The packages of the extra `lab` that are not installed."""
    return [name for name, _ in _ranges() if _version(name) is None]


def has_screen() -> bool:
    """Whether a browser can open a window; on Linux without a screen it might open inside the terminal."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME")
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in screens)


def findings() -> list[Finding]:
    """Python, packages, the device, the kernel, the browser and node, in this order."""
    found = [_python(), *(_package(name, range_) for name, range_ in _ranges()), _step()]
    if _version("jupyterlab"):
        found.append(_kernel())
    return [*found, _browser(), _node()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    needed = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    advice = "" if _in_range(version, needed) else f"Take a Python {needed}."
    return Finding("Python", f"{version}, {sys.executable}", advice)


def _ranges() -> list[tuple[str, str]]:
    """The packages that the library and its extra `lab` require, each with its range of versions."""
    lines = metadata.requires(DISTRIBUTION) or []
    wanted = [line for line in lines if ";" not in line or re.search(r"extra == ['\"]lab['\"]", line)]
    parts = (re.match(r"([\w.-]+)\s*\(?([^;)]*)", line) for line in wanted)
    return [(part[1], part[2].strip()) for part in parts if part]


def _package(name: str, range_: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", pip_line())
    if not _in_range(version, range_):
        return Finding(name, f"{version}, not {range_}", pip_line(f"{name}{range_}"))
    return Finding(name, version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _in_range(version: str, range_: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet  # JupyterLab brings it; without JupyterLab nothing is fine anyway
    except ImportError:
        return True
    return SpecifierSet(range_).contains(version, prereleases=True)


def _step() -> Finding:
    """Run the worked example where the lessons will, and look at its numbers."""
    import torch

    from sft_edu import default_device, sft_microbatch_train_step

    try:
        device = default_device()
        log_probs = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], device=device)
        mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]], device=device)
        loss, _ = sft_microbatch_train_step(log_probs.requires_grad_(), mask, 2)
        gradient = log_probs.grad.cpu()
    except Exception as error:  # a driver can fail in any way
        return Finding("device", f"one step raised {type(error).__name__}: {error}", "See pytorch.org for your device.")
    right = abs(loss.item() - 0.7) < 1e-6 and torch.equal(gradient, mask.cpu() * -0.25)
    name = device.type if device.type != "cuda" else f"cuda, {torch.cuda.get_device_name(device)}"
    if not right:
        return Finding("device", f"{name}: loss {loss.item()}, expected 0.7", "Install PyTorch again.")
    return Finding("device", f"{name}, one step gives 0.7000 as it should")


def _kernel() -> Finding:
    """The kernel that the lessons name must run this Python: another one may not have sft_edu."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Finding("kernel", "python3 is missing", pip_line("ipykernel"))
    # Jupyter takes its own Python for a plain name.
    plain = Path(program).name == program
    if plain or Path(program).absolute() == Path(sys.executable).absolute():
        return Finding("kernel", "python3")
    return Finding("kernel", f"python3 is {program}", f"{sys.executable} -m ipykernel install --sys-prefix")


def _browser() -> Finding:
    try:
        webbrowser.get()
        found = has_screen()
    except webbrowser.Error:
        found = False
    if found:
        return Finding("browser", "can be opened")
    return Finding("browser", "none can open here", "Open the address that sft-edu lab prints.", needed=False)


def _node() -> Finding:
    if shutil.which("node"):
        return Finding("node", "there, for the tests of the pages' own logic")
    return Finding("node", "missing", "Only the tests of the pages' own logic need it.", needed=False)
