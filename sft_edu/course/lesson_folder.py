"""A learner's own folder of lessons: filled, and brought up to date without touching what they have edited.

A manifest in the folder holds a digest of every file as it was copied. A file that still has its digest is nobody's
work and may be replaced; any other is the learner's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from sft_edu.course.lessons import NOTEBOOKS, course_folder
from sft_edu.course.progress import MANIFEST
from sft_edu.training.whole_file import write_whole

_SUFFIXES = (".ipynb", ".md")


@dataclass
class Copied:
    """What happened to the files of a folder: their names in it, `notebooks/00_start_here.ipynb`.

    Attributes:
        new: were not there.
        updated: were there as we had copied them, in another version.
        edited: by the learner, and left alone.
        kept: those of them of which there is a new version -> the name under which that lies beside it.
    """

    new: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for each thing that a learner would want to know; empty in a folder that is as it was copied."""
        lines = [f"New files: {len(self.new)}."] if self.new else []
        lines += [f"Updated, as you had not edited them: {len(self.updated)}."] if self.updated else []
        lines += [f"Kept as you left them: {len(self.edited)}."] if self.edited else []
        lines += [f"The new version of {name} is {other}" for name, other in self.kept.items()]
        return "\n".join(lines)


def copy_lessons(folder: Path) -> Copied:
    """Copy the lessons, their solutions and the docs they link to into a learner's folder.

    What is edited stays as it is. If there is a version of it that the learner has not seen yet, that comes under a
    new name. What was removed comes again.

    Args:
        folder: made if missing.

    Raises:
        NotADirectoryError: there is a file of that name.
        FileExistsError: the folder has files in it and was not filled by this function.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder: got {folder}, which is a file; expected a folder or a new name")
    manifest = folder / MANIFEST
    if folder.is_dir() and any(folder.iterdir()) and not manifest.exists():
        raise FileExistsError(f"folder: got {folder}, which holds other files; expected an empty folder or a new name")
    folder.mkdir(parents=True, exist_ok=True)
    known = _read(manifest)
    if not manifest.exists():
        _replace(manifest, b"{}")  # so that an interrupted copy can go on
    copied = Copied()
    for source in _shipped():
        name = source.relative_to(course_folder()).as_posix()
        _bring(folder, name, source.read_bytes(), known, copied)
    _replace(manifest, json.dumps(known, indent=1).encode())
    return copied


def _shipped() -> list[Path]:
    course = course_folder()
    files = [path for part in (NOTEBOOKS, "docs") for path in (course / part).rglob("*") if path.suffix in _SUFFIXES]
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(course).parts))


def _bring(folder: Path, name: str, content: bytes, known: dict[str, str], copied: Copied) -> None:
    """Write one file where that loses nothing, and note its digest and what was done."""
    target, digest = folder / name, _digest(content)
    there = _digest(target.read_bytes()) if target.exists() else None
    if there is None:
        _replace(target, content)
        copied.new.append(name)
    elif there == digest:
        pass
    elif there == known.get(name):
        _replace(target, content)
        copied.updated.append(name)
    else:
        copied.edited.append(name)
        if digest != known.get(name):  # a version that was not offered yet
            beside = _name_beside(target, digest)
            _replace(beside, content)
            copied.kept[name] = beside.relative_to(folder).as_posix()
    known[name] = digest


def _name_beside(path: Path, digest: str) -> Path:
    """A free name, or one that has this content already: a copy may have been stopped before it noted that."""
    beside, number = path.with_stem(f"{path.stem}_new"), 2
    while beside.exists() and _digest(beside.read_bytes()) != digest:
        beside, number = path.with_stem(f"{path.stem}_new_{number}"), number + 1
    return beside


def _read(manifest: Path) -> dict[str, str]:
    """Name -> digest; empty where it is missing or damaged, and then every file counts as edited."""
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
