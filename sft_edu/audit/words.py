"""Texts of foreign code, made safe to print: names and exceptions, in one line."""

from __future__ import annotations

from collections.abc import Callable

_LONGEST_TEXT = 200


def describe(error: BaseException) -> str:
    """An exception in one line of printable text."""
    try:
        text, kind = str(error), type(error).__name__
        return printable(f"{kind}: {text}" if text else kind)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "an exception whose own text cannot be read"


def name_of(function: Callable[..., object]) -> str:
    """The name of a function, of what a partial calls, or of an object's class, in one line of printable text."""
    try:
        named = function if hasattr(function, "__name__") else getattr(function, "func", function)
        return printable(str(getattr(named, "__name__", type(named).__name__)))
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "a function whose name cannot be read"


def printable(text: str) -> str:
    """One line: white space becomes a space, and what does not print, or would change its direction, is escaped."""
    text = " ".join(text[:10_000].split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
