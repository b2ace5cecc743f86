"""A lab's settings as one short line of text, and back.

`G=4 c=1 rule=notes mask=1101/1111`: a teacher pastes it into a message, a learner into the lab.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Kind:
    """How one kind of setting is written and read."""

    write: Callable[[object], str]
    read: Callable[[str], object]


def _write_mask(mask: Matrix) -> str:
    return "/".join("".join(map(str, row)) for row in mask)


def _read_mask(text: str) -> Matrix:
    if set(text) - set("01/"):
        raise ValueError("rows of 0 and 1 with / between them are expected")
    return tuple(tuple(int(value) for value in row) for row in text.split("/"))


def _write_matrix(matrix: Matrix) -> str:
    return "/".join(",".join(f"{value:.6g}" for value in row) for row in matrix)


def _read_matrix(text: str) -> Matrix:
    return tuple(tuple(float(value) for value in row.split(",")) for row in text.split("/"))


INTEGER = Kind(str, int)
NUMBER = Kind(lambda value: f"{value:g}", float)
NAME = Kind(str, str)
MASK = Kind(_write_mask, _read_mask)
MATRIX = Kind(_write_matrix, _read_matrix)


def write(settings: Mapping[str, tuple[Kind, object]]) -> str:
    """`key=value` for each setting, in order, between spaces."""
    return " ".join(f"{key}={kind.write(value)}" for key, (kind, value) in settings.items())


def read(text: str, kinds: Mapping[str, Kind]) -> dict[str, object]:
    """The settings named in a text. A setting that is not named is left out.

    Raises:
        ValueError: a word is not `key=value`, the key is unknown, or its value cannot be read.
    """
    settings: dict[str, object] = {}
    for word in text.split():
        key, separator, value = word.partition("=")
        if not separator or key not in kinds:
            raise ValueError(f"state: got {word!r}; expected key=value with a key of {', '.join(kinds)}")
        try:
            settings[key] = kinds[key].read(value)
        except ValueError as error:
            raise ValueError(f"state: got {word!r}; its value cannot be read ({error})") from error
    return settings
