"""What the small views have in common: numbers and texts go to the page, and the page draws them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping

import anywidget
import traitlets

from sft_edu.widgets.figure import with_text_and_picture


class LiveView(anywidget.AnyWidget):
    """A view that is drawn by the page from traits.

    Set what belongs together in one message, and count it, so that a test knows what a picture answers:

        with view.hold_sync():
            view.words = "..."
            view.drawn += 1

    The page writes the count to `data-drawn` of the view once all of the message is drawn.
    """

    drawn = traitlets.Int().tag(sync=True)

    def _repr_mimebundle_(self, **kwargs: object) -> dict | tuple:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self))


Check = Callable[[str, object], object]
"""Takes what a value is called and the value; returns it clean or raises a TraitError."""


def text(where: str, value: object) -> str:
    """Half a surrogate pair would not survive the way to the page."""
    if not isinstance(value, str):
        raise wrong(where, value, "a text")
    return value.encode("utf-8", "replace").decode("utf-8")


def number(where: str, value: object) -> float:
    """JSON has no NaN and no infinity."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(where, value, "a finite number")
    return float(value)


def texts(where: str, values: list) -> list[str]:
    return [text(f"{where}[{index}]", value) for index, value in enumerate(values)]


def records(where: str, values: list, checks: Mapping[str, Check], defaults: Mapping[str, object]) -> list[dict]:
    """Fresh dicts, so that nobody can change one from outside."""
    clean = []
    for index, value in enumerate(values):
        here = f"{where}[{index}]"
        if not isinstance(value, Mapping) or not checks.keys() - defaults.keys() <= value.keys() <= checks.keys():
            optional = f" ({', '.join(defaults)} may be left out)" if defaults else ""
            raise wrong(here, value, f"a dict with the keys {', '.join(checks)}{optional}")
        whole = {**defaults, **value}
        clean.append({key: check(f"{here}[{key!r}]", whole[key]) for key, check in checks.items()})
    return clean


def wrong(where: str, value: object, expected: str) -> traitlets.TraitError:
    given = repr(value)
    return traitlets.TraitError(f"{where}: got {given[:80]}{'…' * (len(given) > 80)}; expected {expected}")
