"""The command `sft-edu lab`: a learner's own copy of the lessons, opened in JupyterLab.

The settings that the labs need lie in `jupyter_settings/` and are given to this one server; a user's own Jupyter
configuration is neither read differently nor written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from sft_edu.commands.lab_check import findings, has_screen, missing_packages, pip_line
from sft_edu.course.lesson_folder import copy_lessons
from sft_edu.course.lessons import NOTEBOOKS, course_folder
from sft_edu.course.progress import VARIABLE

FOLDER = "sft_edu_lessons"
START = f"{NOTEBOOKS}/00_start_here.ipynb"
SETTINGS = Path(__file__).parents[1] / "jupyter_settings"


def add_lab(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `lab` to those of the command."""
    parser = commands.add_parser(
        "lab",
        help="open the lessons in JupyterLab",
        description="Copy the lessons into a folder of yours and open the first in JupyterLab. What you have edited "
        "there is kept, and your progress with it.",
        epilog="Exit status: that of JupyterLab; with --check 0 if all is fine and 1 if not; 2 if it cannot start.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--folder", type=Path, default=Path(FOLDER), help=f"of your lessons (default: {FOLDER})")
    where.add_argument("--in-place", action="store_true", help="open the lessons of this repository, not a copy")
    parser.add_argument("--port", type=int, help="of the server (default: 8888, or the next free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    parser.add_argument("--check", action="store_true", help="say whether everything needed is here, and stop")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --: an option of JupyterLab")
    parser.set_defaults(run=_lab)


def _lab(options: argparse.Namespace) -> int:
    try:
        return _check_or_open(options)
    except PackageNotFoundError as error:  # run from its source alone, nobody knows what it requires
        return _refuse(f"{error}. Install it, for example in its repository: {pip_line('-e .[lab]')}")


def _check_or_open(options: argparse.Namespace) -> int:
    if options.check:
        found = findings()
        print(*found, sep="\n")
        return 0 if all(finding.fine for finding in found) else 1
    missing = missing_packages()
    if missing:
        return _refuse(f"Not installed: {', '.join(missing)}. Install what the lessons need:\n    {pip_line()}")
    try:
        folder = course_folder() if options.in_place else options.folder.expanduser().resolve()
        if options.in_place and not (folder / "pyproject.toml").exists():
            return _refuse("--in-place: got an installed package; expected a repository. Leave it out for a copy")
        copied = "" if options.in_place else str(copy_lessons(folder))
    except OSError as error:
        return _refuse(str(error))
    print(f"Lessons: {folder / NOTEBOOKS}", copied, sep="\n" if copied else "", flush=True)
    return _start(_command(folder, options), os.environ | _environment(folder))


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 2


def _command(folder: Path, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}"]
    command += [f"--LabApp.default_url=/lab/tree/{START}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command += ["--allow-root"]  # Jupyter refuses to run as root unless told to
    if options.no_browser or not has_screen():
        command += ["--no-browser"]  # Jupyter prints the address either way
    if options.port is not None:
        command += [f"--port={options.port}"]
    return command + options.options


def _environment(folder: Path) -> Mapping[str, str]:
    """Our settings go before all others of the same name; nothing is written into anybody's.

    So do our programs: in JupyterLab's terminals the lessons' commands, `sft-edu` and `torchrun`, work as they stand.
    """
    theirs = os.environ.get("JUPYTER_CONFIG_PATH")
    return {
        "PATH": os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), os.environ.get("PATH")])),
        "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, [str(SETTINGS), theirs])),
        VARIABLE: str(folder),
    }


def _start(command: list[str], environment: Mapping[str, str]) -> int:
    """Become JupyterLab: torch, which this command has loaded, leaves the memory. Windows cannot, and waits for it."""
    if os.name == "posix":
        os.execve(command[0], command, environment)
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # Jupyter heard it too, and asks whether it is meant
                continue
