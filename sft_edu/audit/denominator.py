"""Recover a denominator from measured values: which product of powers of the counts is it?

If D = k * B^b * G^g * ..., then log D is linear in the logarithms of the counts, so least squares finds the exponents.
They are rounded to halves and then held against every measurement: a formula that is named has passed all of them. What
is no product is tried as one that has a single count in another shape, such as G + 2 or G^G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import torch

TOLERANCE = 2e-6
"""Relative. A step that computes in float32 is right to about 2e-7."""

NOT_A_PRODUCT = "(not a product)"
NOT_DETERMINED = "not determined by these data"
_LEAST_DIRECTION = 2e-5  # relative: below, the noise that `TOLERANCE` allows would reach the exponents
_LARGEST_GROWTH = 40  # x^x of a larger count leaves float64's range too soon to be looked for
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Point(NamedTuple):
    """One measurement: the value of each count, all above 0, and D, above 0."""

    counts: Mapping[str, float]
    value: float


@dataclass(frozen=True)
class Denominator:
    """What was recovered.

    `formula` is text such as `c·G²`, `G²/B` or `c·(G+2) (not a product)`. For a product, `powers` holds the exponents
    other than 0 and `factor` the constant number; otherwise both are None. `predict` gives D for other counts, where a
    formula was found.
    """

    formula: str
    powers: Mapping[str, Fraction] | None = None
    factor: float | None = None
    predict: Callable[[Mapping[str, float]], float] | None = field(default=None, repr=False, compare=False)


def recover(points: Sequence[Point], symbols: Sequence[str]) -> Denominator:
    """The formula that all points agree with.

    Args:
        points: measurements. The first is the centre: for a count to be found in another shape than a power, there
            have to be points that differ from the first in that count alone, at least three.
        symbols: the counts, in the order in which the formula names them.

    Returns:
        A `Denominator`. Where no formula was found its text is a short table of measured values, and `NOT_DETERMINED`
        where several formulas would agree with all points, because too few counts vary apart from the others.
    """
    exponents = _least_squares(points, symbols)
    if exponents is None:
        return Denominator(NOT_DETERMINED)
    product = _as_product(points, exponents)
    if product is not None:
        return product
    # One count may enter in another shape. Its series of points shows that, because all else is the same there.
    along = {symbol: series(points, symbol) for symbol in symbols}
    slopes = {symbol: _slope(line, symbol) for symbol, line in along.items()}
    odd = [symbol for symbol, slope in slopes.items() if slope is None]
    if len(odd) == 1:
        powers = {symbol: slope for symbol, slope in slopes.items() if slope}
        found = _other_shape(points, along[odd[0]], odd[0], powers)
        if found is not None:
            return found
    return _of_one_count(points, symbols) or Denominator(_table(points, along, odd))


def series(points: Sequence[Point], symbol: str) -> list[Point]:
    """The first point and those that differ from it in `symbol` alone, one for each value, ascending."""
    first = points[0].counts
    alike = [point for point in points if all(point.counts[s] == first[s] for s in first if s != symbol)]
    return sorted({point.counts[symbol]: point for point in alike}.values(), key=lambda point: point.counts[symbol])


def varies(points: Sequence[Point], symbol: str) -> bool:
    """Whether D depends on this count while all else is the same."""
    return not _constant([point.value for point in series(points, symbol)])


def product_text(powers: Mapping[str, Fraction | int], factor: float = 1.0, extra: str = "") -> str:
    """A product as text: `c·G²`, `2·√G/B`, `1/(B·G)`. `extra` is one more factor above the line."""
    above = [_power_text(symbol, power) for symbol, power in powers.items() if power > 0]
    below = [_power_text(symbol, -power) for symbol, power in powers.items() if power < 0]
    if abs(factor - 1) > TOLERANCE:
        divides = 1e-6 < abs(factor) < 1 and _close(1 / factor, round(1 / factor))
        (below if divides else above).insert(0, number(1 / factor if divides else factor))
    above += [extra] if extra else []
    denominator = "·".join(below) if len(below) < 2 else f"({'·'.join(below)})"
    return "·".join(above or ["1"]) + (f"/{denominator}" if below else "")


def number(value: float) -> str:
    """Six digits at most, an integer without a point."""
    is_integer = abs(value) < 1e6 and _close(value, round(value))
    return f"{round(value)}" if is_integer else f"{value:.6g}"


def _known_digits(value: float, noise: float) -> str:
    """A number with the digits that stand out of the noise, one at least and six at most."""
    return number(value) if value.is_integer() else f"{value:.{max(1, min(6, int(math.log10(value / noise)) + 1))}g}"


def _power_text(symbol: str, power: Fraction | int) -> str:
    power = Fraction(power)
    if power == Fraction(1, 2):
        return f"√{symbol}"
    if power.denominator != 1:
        return f"{symbol}^({power})"
    return symbol if power == 1 else symbol + str(power).translate(_SUPERSCRIPTS)


def _least_squares(points: Sequence[Point], symbols: Sequence[str]) -> dict[str, float] | None:
    """The exponent of each count that is not the same everywhere, None where others would do as well."""
    free = [symbol for symbol in symbols if not _constant([point.counts[symbol] for point in points])]
    rows = [[1.0, *(math.log(point.counts[symbol]) for symbol in free)] for point in points]
    values = [[math.log(point.value)] for point in points]
    matrix, right = (torch.tensor(rows_, dtype=torch.float64, device="cpu") for rows_ in (rows, values))
    found = torch.linalg.lstsq(matrix, right, rcond=_LEAST_DIRECTION, driver="gelsd")
    if found.rank < len(free) + 1:
        return None
    return dict(zip(free, found.solution.flatten().tolist()[1:], strict=True))


def _as_product(points: Sequence[Point], exponents: Mapping[str, float]) -> Denominator | None:
    powers = {symbol: _half(exponent) for symbol, exponent in exponents.items() if _half(exponent) != 0}
    factors = [point.value / _product(powers, point.counts) for point in points]
    if not _constant(factors):
        return None
    factor = _snap(sum(factors) / len(factors))
    return Denominator(product_text(powers, factor), powers, factor, lambda counts: factor * _product(powers, counts))


def _of_one_count(points: Sequence[Point], symbols: Sequence[str]) -> Denominator | None:
    """D as a function of a single count, where no two points with the same count differ. Others may vary beside it."""
    for symbol in symbols:
        line = {point.counts[symbol]: point for point in sorted(points, key=lambda point: point.counts[symbol])}
        if len(line) > 2 and all(_close(point.value, line[point.counts[symbol]].value) for point in points):
            along = list(line.values())
            return _other_shape(points, along, symbol, {}) or Denominator(_table(points, {symbol: along}, [symbol]))
    return None


def _other_shape(
    points: Sequence[Point], line: Sequence[Point], symbol: str, powers: Mapping[str, Fraction]
) -> Denominator | None:
    """A product in which one count stands as `G+2`, `2·G+3`, `G^G`, `G!` or `2^G`, perhaps times a power of it."""
    rest = _product(powers, line[0].counts)
    for power in (0, 1, -1, 2, -2, 3):
        xs = [point.counts[symbol] for point in line]
        ys = [point.value / rest / x**power for point, x in zip(line, xs, strict=True)]
        for shape, text in _shapes(symbol, xs, ys):

            def predict(counts: Mapping[str, float], shape: Any = shape, power: Any = power) -> float:
                return _product(powers, counts) * counts[symbol] ** power * shape(counts[symbol])

            if _fits(points, predict):
                with_own = dict(powers) | ({symbol: Fraction(power)} if power else {})
                is_sum = "+" in text or "-" in text
                extra = f"({text})" if with_own and is_sum else text
                return Denominator(f"{product_text(with_own, extra=extra)} {NOT_A_PRODUCT}", predict=predict)
    return None


def _fits(points: Sequence[Point], predict: Callable[[Mapping[str, float]], float]) -> bool:
    try:
        return all(_close(point.value, predict(point.counts)) for point in points)
    except OverflowError:
        return False


def _shapes(symbol: str, xs: Sequence[float], ys: Sequence[float]) -> Iterable[tuple[Callable[[float], float], str]]:
    """Functions through the first measured values, each with its text. Whether they fit the others is not looked at."""
    slope = _snap((ys[1] - ys[0]) / (xs[1] - xs[0]))
    offset = _snap(ys[0] - slope * xs[0])
    if not _close(ys[0], ys[1]) and abs(offset) > TOLERANCE * abs(ys[0]):
        factor = "" if slope == 1 else f"{number(slope)}·"
        size = _known_digits(abs(offset), TOLERANCE * abs(ys[0]))
        yield lambda x: slope * x + offset, f"{factor}{symbol}{'+' if offset > 0 else '-'}{size}"
    if max(xs) > _LARGEST_GROWTH:
        return
    for grow, text in ((lambda x: x**x, f"{symbol}^{symbol}"), (lambda x: math.gamma(x + 1), f"{symbol}!")):
        factor = _snap(ys[0] / grow(xs[0]))
        yield lambda x, g=grow, k=factor: k * g(x), product_text({}, factor, text)
    base = _snap((ys[1] / ys[0]) ** (1 / (xs[1] - xs[0])))
    factor = _snap(ys[0] / base ** xs[0])
    yield lambda x: factor * base**x, product_text({}, factor, f"{number(base)}^{symbol}")


def _table(points: Sequence[Point], along: Mapping[str, Sequence[Point]], odd: Sequence[str]) -> str:
    """Measured values along the count that is no power, else the first points with all their counts."""
    symbol = next((s for s in ("G", *odd) if s in odd), None)
    if symbol is not None:
        line = along[symbol]
        shown = [*line[:3], *line[3:][-1:]]  # where it stops being what it was, the last one says so
        cells = [f"{number(point.value)} at {symbol} = {number(point.counts[symbol])}" for point in shown]
    else:
        step = max(1, len(points) // 3)
        cells = [
            f"{number(value)} at " + ", ".join(f"{s} = {number(x)}" for s, x in counts.items())
            for counts, value in points[::step][:3]
        ]
    return f"{'; '.join(cells)} {NOT_A_PRODUCT}"


def _slope(line: Sequence[Point], symbol: str) -> Fraction | None:
    """The exponent along a series, None where the values are no power. 0 where there is no series."""
    if len(line) < 2:
        return Fraction(0)
    first, last = line[0], line[-1]
    power = _half(math.log(last.value / first.value) / math.log(last.counts[symbol] / first.counts[symbol]))
    is_power = _constant([point.value / float(point.counts[symbol]) ** float(power) for point in line])
    return power if is_power else None


def _product(powers: Mapping[str, Fraction], counts: Mapping[str, float]) -> float:
    return math.prod(float(counts[symbol]) ** float(power) for symbol, power in powers.items())


def _half(exponent: float) -> Fraction:
    return Fraction(round(2 * exponent), 2)


def _snap(value: float) -> float:
    """The integer next to it, where that is what was meant."""
    return float(round(value)) if round(value) and abs(value - round(value)) <= 10 * TOLERANCE * abs(value) else value


def _constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= TOLERANCE * abs(max(values, key=abs))


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))
