"""How numbers are printed: four digits after the point, and never a small number as 0."""

from __future__ import annotations


def fixed(value: float, places: int = 4) -> str:
    """`-0.2500`; as a power of ten where so few places would hide the number or run long: `9.766e-04`."""
    if value == 0 or 10 ** (1 - places) <= abs(value) < 1e6:
        return f"{value + 0.0:.{places}f}"  # + 0.0: -0.0 is 0.0
    return f"{value:.{places - 1}e}"


def compact(value: float) -> str:
    """Integers without a point, all else like `fixed`."""
    return str(int(value)) if abs(value) < 1e6 and value == int(value) else fixed(value)


def number_of(count: int, noun: str, plural: str = "s") -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {noun}{plural if count != 1 else ''}"
