"""Whose a folder is: free for a new run, or of a run that goes on, and then of one process alone."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from filelock import FileLock

from sft_edu.commands.run_results import MODEL, REPORT
from sft_edu.commands.run_settings import SETTINGS, RunSettings
from sft_edu.ranks.torchrun import is_launched
from sft_edu.training.run import CHECKPOINTS, METRICS
from sft_edu.training.whole_file import write_whole

LOCK = ".lock"
_LAUNCH = ".launch"


def check_free(folder: Path) -> None:
    """Refuse a folder that holds a run, or anything else that a run would write over.

    Raises:
        ValueError: the text says what is there and what to do.
    """
    if any((folder / name).exists() for name in (SETTINGS, METRICS, CHECKPOINTS)):
        raise ValueError(
            f"{folder}: holds a run. Go on with it: {resume_command(folder)}\nOr take another folder: --out"
        )
    for path in (folder / MODEL, folder / f"{MODEL}.pt", folder / REPORT):
        if os.path.lexists(path):
            raise ValueError(f"{path}: is there already, and a run would write it; take another folder: --out")


def claim(folder: Path, lock: FileLock, settings: RunSettings, resume: bool) -> None:
    """Lock a folder and, unless the run there goes on, begin one in it.

    Raises:
        filelock.Timeout: another process has it.
        ValueError: see `check_free`.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if not resume:
        check_free(folder)  # somebody may have begun one meanwhile
        if launch := _launch():
            write_whole(folder / _LAUNCH, launch.encode())
        settings.write(folder)


def is_restarted(folder: Path) -> bool:
    """Whether torchrun starts this process again, after it began the run in the folder."""
    note = folder / _LAUNCH
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (folder / SETTINGS).exists():
        return False
    return note.exists() and note.read_text(encoding="utf-8") == _launch()


def resume_command(folder: Path, *, shard: bool = False) -> str:
    """What goes on with the run in the folder, on as many processes as there are now."""
    start = "sft-edu"
    if is_launched():
        on_each = os.environ.get("LOCAL_WORLD_SIZE")
        # Of several machines nobody knows here how they find each other.
        start = f"--nproc-per-node {on_each}" if on_each == os.environ["WORLD_SIZE"] else "..."
        start = f"torchrun {start} -m sft_edu"
    return f"{start} train{' --shard' * shard} --resume --out {shlex.quote(str(folder))}"


def _launch() -> str:
    """What no other start of torchrun has; empty without one."""
    # The id of a run is "none" unless somebody chooses one. Each start has a new folder for the logs of all attempts.
    log = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return str(Path(log).parents[2]) if log else ""
