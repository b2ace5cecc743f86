"""Check the denominators of the rules, as the learner wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import Judged, call, judged, reading, smallest
from sft_edu.exercises.verdict import NOT_STARTED, Verdict, close, numbers, right, wrong
from sft_edu.scaling import RULES

_SYMBOLS = ("B", "G", "c", "n", "N")
# Two sets of counts in which no product coincides with another: a wrong formula cannot hide.
_COUNTS = ({"B": 3, "G": 5, "c": 1.75, "n": 11, "N": 41}, {"B": 7, "G": 4, "c": 0.6, "n": 13, "N": 97})
# One count at a time, then all: the first that fails says which count is at fault.
_SMALL = (
    *(dict.fromkeys(_SYMBOLS, 1) | {one: value} for one, value in zip(_SYMBOLS, (2, 3, 4, 5, 7), strict=True)),
    {"B": 2, "G": 3, "c": 4, "n": 5, "N": 7},
)


@remembered
def check_denominator(denominator: Callable[..., float] | Mapping[str, Callable[..., float]]) -> Verdict:
    """Check the denominators of all rules: D, so that `scaled_loss = -(masked sum, before dividing by c) / D`.

    Args:
        denominator: a function called as `denominator(rule, B, G, c, n, N)`, or a dict with a function
            `f(B, G, c, n, N)` for each rule. Returns D, a number.
    """
    if isinstance(denominator, Mapping):
        return _check_each(lambda rule, *counts: call(_of(denominator, rule), *counts))
    return _check_each(denominator)


@judged
def _check_each(denominator: Callable[..., float]) -> Verdict:
    for rule in RULES:
        for counts in _COUNTS:
            problem = _problem(_value(denominator, rule, counts), rule, counts)
            if problem:
                code, hint = problem
                cases = [_Case(small) for small in (*_SMALL, counts)]
                return wrong(code, f"{rule}: {hint}", *smallest(cases, partial(_compare, denominator, rule)))
    formulas = ", ".join(f"{rule.name} {rule.formula}" for rule in RULES.values())
    return right(f"All {len(RULES)} agree: {formulas}.")


class _Case(dict):
    """Counts by their symbols."""

    def __str__(self) -> str:
        return ", ".join(f"{symbol} = {numbers(self[symbol])}" for symbol in _SYMBOLS)


def _of(denominators: Mapping[str, Callable], rule: str) -> Callable:
    if rule not in denominators:
        raise Judged(wrong("missing-rule", f"{rule}: not in your dict."))
    if denominators[rule] is ...:
        raise Judged(NOT_STARTED)
    return denominators[rule]


def _value(denominator: Callable, rule: str, counts: Mapping[str, float], quiet: bool = False) -> float:
    value = call(denominator, rule, *(counts[symbol] for symbol in _SYMBOLS), quiet=quiet)
    try:
        with reading("a number"):
            return float(value)
    except Judged:
        hint = f"{rule}: got {type(value).__name__}; a number is asked for."
        raise Judged(wrong("not-a-number", hint)) from None


def _compare(denominator: Callable, rule: str, counts: _Case) -> tuple[str, float] | None:
    found, expected = _value(denominator, rule, counts, quiet=True), _expected(rule, counts)
    if close(found, expected):
        return None
    return f"{counts}: got {numbers(found)}, expected {numbers(expected)}.", abs(found - expected)


def _problem(value: float, rule: str, counts: Mapping[str, float]) -> tuple[str, str] | None:
    """Code and hint for a wrong denominator, None for a right one."""
    expected = _expected(rule, counts)
    if close(value, expected):
        return None
    batch, steps, constant, own, total = (counts[symbol] for symbol in _SYMBOLS)
    mistakes = [
        ("constant-missing", "the constant c is missing; this rule divides by it too.", expected / constant),
        ("constant-extra", "c is in your formula; a mean over tokens does not depend on it.", expected * constant),
        ("g-missing-once", "G is missing once.", expected / steps),
        ("g-missing", "G is missing.", expected / steps**2),
        ("g-too-often", "G is in your formula once too often.", expected * steps),
        ("b-missing", "B is missing.", expected / batch),
        ("b-extra", "B is in your formula; this rule does not count sequences.", expected * batch),
        (
            "total-for-own",
            "you wrote N, the tokens of all microbatches; this rule counts those of its own, n.",
            expected * total / own,
        ),
        (
            "own-for-total",
            "you wrote n, the tokens of one microbatch; this rule counts those of all, N.",
            expected * own / total,
        ),
        ("inverse", "that is 1/D. D is what the loss is divided by.", 1 / expected),
        ("negative", "D is positive; the minus sign belongs to the loss.", -expected),
        ("twice-g", "you wrote G + G; the two divisions by G multiply.", constant * 2 * steps),
        ("g-to-the-g", "you wrote G**G; G divides twice, so G**2.", constant * steps**steps),
        *(("other-rule", f"that is the denominator of {name}.", _expected(name, counts)) for name in RULES),
    ]
    for code, hint, wrong_value in mistakes:
        if close(value, wrong_value):
            return code, hint
    return "other", f"not yet. Accumulated, it has to be {RULES[rule].accumulates_to}."


def _expected(rule: str, counts: Mapping[str, float]) -> float:
    return RULES[rule].denominator({"1": 1} | counts)
