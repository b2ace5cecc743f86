"""The tokens of a microbatch as chips, and a response mask to paint on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import anywidget
import torch
import traitlets

from sft_edu.masks import token_roles
from sft_edu.widgets.figure import with_text_and_picture
from sft_edu.widgets.page import page_text

ROLES = ("prompt", "response", "padding", "eos")

Table = tuple[tuple, ...]

_LONGEST_TEXT = 80
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class _TableTrait(traitlets.TraitType):
    """B rows of T cells, as tuples. Its shape is checked by the widget, which knows the other tables."""

    default_value = ()

    def validate(self, widget: TokenMask, value: object) -> Table:
        return _table(self.name, value)


class TokenMask(anywidget.AnyWidget):
    """B rows of T tokens, each a button: a strong frame for 1, a pale one for 0.

    Press flips a token, dragging paints with the state of the first one. Shift paints the range from the last touched
    token, with its state and in reading order, like a selection of text. Arrow keys move, Space flips, Shift and
    arrows paint a range. Ctrl+Z takes a stroke back, Ctrl+Shift+Z does it again: the tokens of that stroke get the
    state they had, all others stay as they are, whoever changed them since.

    The page shows a stroke at once; then `mask` follows. Where an observer or validator makes another mask of it, that
    one is shown.

    Every trait can be set: to what has the same shape, or all of them together by `show`.

    Args:
        tokens: B rows of T texts, already visible (see `sft_edu.visible_token`). What still cannot be seen becomes
            `x` and its number, and a text ends after 80 characters.
        mask: B rows of T values, 0 or 1; a tensor will do.
        labels: B rows of T roles: prompt, response, padding, eos. None: what follows from the mask, if it is a correct
            one, and from the tokens `<eos>` and `<pad>`.
        values: B rows of T numbers that shade the tokens: white for exactly 0, orange below, purple above (padding only
            where it is not 0); or empty.
        value_name: what the values are, in a word.
        notes: B rows of T texts that are shown with a token under the pointer or in focus; or empty.

    `focused` is the sequence and the token that was touched last, by pointer or key.
    """

    _esm = page_text("view.js", "token_grid.js", "token_mask.js")
    _css = page_text("view.css", "token_mask.css")

    tokens = _TableTrait().tag(sync=True)
    mask = _TableTrait().tag(
        sync=True,  # as '1101 1111': a drag sends it with every frame
        to_json=lambda mask, _: _mask_text(mask),
        from_json=lambda text, _: _mask_of_text(text),
    )
    labels = _TableTrait().tag(sync=True)
    values = _TableTrait().tag(
        sync=True,  # JSON has no NaN and no infinity
        to_json=lambda values, _: [[v if math.isfinite(v) else _NOT_FINITE[str(v)] for v in row] for row in values],
    )
    value_name = traitlets.Unicode("value").tag(sync=True)
    notes = _TableTrait().tag(sync=True)
    focused = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(0, 0)).tag(sync=True)

    def __init__(
        self,
        tokens: Sequence[Sequence[str]],
        mask: Sequence[Sequence[int]],
        labels: Sequence[Sequence[str]] | None = None,
        values: Sequence[Sequence[float]] = (),
        value_name: str = "value",
        notes: Sequence[Sequence[str]] = (),
        **layout: object,
    ) -> None:
        tables = _tables(tokens, mask, labels, values, notes)
        super().__init__(**tables, value_name=value_name, **layout)

    def show(
        self,
        tokens: Sequence[Sequence[str]],
        mask: Sequence[Sequence[int]],
        labels: Sequence[Sequence[str]] | None = None,
        values: Sequence[Sequence[float]] = (),
        notes: Sequence[Sequence[str]] = (),
    ) -> None:
        """Show other tokens, of any shape. All of it is accepted and arrives together, or nothing changes."""
        tables = _tables(tokens, mask, labels, values, notes)
        with self.hold_sync(), self.hold_trait_notifications():
            for name, table in tables.items():
                setattr(self, name, table)

    def set_state(self, sync_data: dict) -> None:
        """Take what a page sends. A mask that is not taken as it came goes back as it is: the kernel's mask wins."""
        try:
            super().set_state(sync_data)
        finally:
            if sync_data.get("mask", _mask_text(self.mask)) != _mask_text(self.mask):
                self.send_state("mask")

    @traitlets.validate("tokens", "mask", "labels", "values", "notes")
    def _check_against_the_others(self, proposal) -> Table:
        name, table = proposal["trait"].name, proposal["value"]
        # tokens give the shape; so it is they that must fit all the others.
        for other in ("mask", "labels", "values", "notes") if name == "tokens" else ("tokens",):
            _check_shape(name, table, other, getattr(self, other))
        return table

    @traitlets.validate("focused")
    def _check_focused(self, proposal) -> tuple[int, int]:
        (row, position), (rows, length) = proposal["value"], _shape(self.tokens)
        if not (0 <= row < rows and 0 <= position < length):
            raise traitlets.TraitError(f"focused: got {(row, position)}; expected a place in {_say((rows, length))}")
        return row, position

    @traitlets.observe("tokens")
    def _keep_focus_inside(self, change) -> None:
        rows, length = _shape(self.tokens)
        self.focused = (min(self.focused[0], rows - 1), min(self.focused[1], length - 1))

    @traitlets.validate("value_name")
    def _check_value_name(self, proposal) -> str:
        return _text(proposal["value"])

    def __repr__(self) -> str:
        return f"TokenMask(mask={_mask_text(self.mask)!r})"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self))


def _tables(tokens, mask, labels, values, notes) -> dict[str, Table]:
    """All of them checked, and tokens last: where a shape does not fit, the other is to blame."""
    tokens, mask = _table("tokens", tokens), _table("mask", mask)
    labels = _roles(tokens, mask) if labels is None else _table("labels", labels)
    tables = {"mask": mask, "labels": labels, "values": _table("values", values), "notes": _table("notes", notes)}
    for name, table in tables.items():
        _check_shape(name, table, "tokens", tokens)
    return tables | {"tokens": tokens}


def _roles(tokens: Table, mask: Table) -> Table:
    """Roles for a correct mask. A row without a 1 has no end that padding could follow: only `<pad>` is padding there.

    Rows of another shape are let pass: the check of shapes comes next.
    """

    def role(role: str, token: str, trained: bool) -> str:
        if role == "padding" and not trained:
            return "padding" if token == "<pad>" else "prompt"
        return "eos" if role != "padding" and token == "<eos>" else role

    rows = zip(token_roles(torch.tensor(mask)), tokens, mask, strict=False)
    return tuple(
        tuple(role(*cell, any(bits)) for cell in zip(roles, texts, strict=False)) for roles, texts, bits in rows
    )


def _text(cell: object) -> str:
    """Visible text, of a bounded length. Half a surrogate pair would not survive JSON, a bidi control would reorder
    the row."""
    if not isinstance(cell, str):
        raise TypeError
    cut = cell if len(cell) <= _LONGEST_TEXT else f"{cell[:_LONGEST_TEXT]}…"
    return "".join(c if c.isprintable() else f"x{ord(c):02x}" for c in cut)


def _bit(cell: object) -> int:
    if cell not in (0, 1):
        raise ValueError
    return int(cell)


def _role(cell: object) -> str:
    if cell not in ROLES:
        raise ValueError
    return cell


def _number(cell: object) -> float:
    if isinstance(cell, str):
        raise TypeError
    return float(cell)


_CELLS: dict[str, tuple[Callable, str]] = {
    "tokens": (_text, "a text"),
    "mask": (_bit, "0 or 1"),
    "labels": (_role, f"one of {', '.join(ROLES)}"),
    "values": (_number, "a number"),
    "notes": (_text, "a text"),
}
_MAY_BE_EMPTY = ("values", "notes")


def _table(name: str, value: object) -> Table:
    """B rows of T cells as tuples, so that nobody can change one from outside."""
    read, expected = _CELLS[name]
    try:
        rows = [_listed(row) for row in _listed(value)]
    except TypeError:
        raise traitlets.TraitError(f"{name}: got {value!r:.60}; expected rows of {expected}") from None
    if not rows and name in _MAY_BE_EMPTY:
        return ()
    if not rows or not all(rows) or len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows[:8]) or "none"
        raise traitlets.TraitError(f"{name}: got rows of length {lengths}; expected rows of one length, at least 1")
    table = []
    for index, row in enumerate(rows):
        cells = []
        for position, cell in enumerate(row):
            try:
                cells.append(read(cell))
            except (TypeError, ValueError, OverflowError, RuntimeError):
                raise traitlets.TraitError(
                    f"{name}: got {cell!r:.60} for token {position} of sequence {index}; expected {expected}"
                ) from None
        table.append(tuple(cells))
    return tuple(table)


def _listed(value: object) -> list:
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor or array
    if isinstance(value, str):
        raise TypeError
    return list(value)


def _shape(table: Table) -> tuple[int, int] | None:
    return (len(table), len(table[0])) if table else None


def _check_shape(name: str, table: Table, other: str, other_table: Table) -> None:
    given, expected = _shape(table), _shape(other_table)
    if given and expected and given != expected:
        raise traitlets.TraitError(
            f"{name}: got {_say(given)}; expected {_say(expected)}, as in {other} (show() sets all of them together)"
        )


def _say(shape: tuple[int, int]) -> str:
    return f"{shape[0]} rows of {shape[1]}"


def _mask_text(mask: Table) -> str:
    return " ".join("".join(map(str, row)) for row in mask)


def _mask_of_text(text: object) -> object:
    if not isinstance(text, str):
        return text  # for the check to refuse
    return [[int(digit) if digit in "01" else digit for digit in row] for row in text.split(" ")]
