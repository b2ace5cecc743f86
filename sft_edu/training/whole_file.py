"""A file that is either whole or as it was before, whatever happens while it is written."""

from __future__ import annotations

import os
from pathlib import Path

_UNFINISHED = ".unfinished"


def write_whole(path: str | os.PathLike, content: bytes | memoryview) -> Path:
    """Write a file under another name, flush it to the disk, and then give it its name.

    Raises:
        OSError: it could not be written (a full disk, a read-only folder); what was there still is.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return path


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what a killed writer left."""
    for path in Path(folder).glob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
