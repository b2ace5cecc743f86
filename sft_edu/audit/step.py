"""Which rule does this step implement, anybody's step, and what else does it do?

The evidence is the gradient that autograd leaves in the log-probs it was given. The gradient of a response token is
-1/D, so every call measures a denominator; calls that differ in one count show how D depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isnan, nan

from sft_edu.audit import findings
from sft_edu.audit.denominator import (
    NOT_A_PRODUCT,
    TOLERANCE,
    Denominator,
    Point,
    number,
    product_text,
    recover,
    series,
)
from sft_edu.audit.form import unknown
from sft_edu.audit.probe import Outcome, Probe
from sft_edu.audit.probe_cases import SYMBOLS, Case, Cases
from sft_edu.audit.report import NOT_MEASURED, PROBLEMS, TRAINED_ROWS, StepAudit, consequence_of, rule_of
from sft_edu.audit.token_weights import sequence_weights
from sft_edu.audit.words import name_of, printable
from sft_edu.global_state import plain_settings, random_state_kept

Call = tuple[Case, Outcome]

_COARSE = f"{NOT_MEASURED}: the gradient is rounded to"
_SCALED = f"{NOT_MEASURED}: the step scales what autograd added"
_UNEVEN = "not a fixed weight per token"
_FEWEST = 3  # values of a count, where the step raised for the others


def audit_step(step: Callable[..., object], *, seed: int = 0) -> StepAudit:
    """Measure which denominator a microbatch step divides by, and what else it does that a step should not.

    The step is called some forty times with small ragged microbatches on the CPU. It may take the constant or not, be
    called by position only, and want its mask as bool, integer or float: the first form that does not raise is used,
    in that order. Parameters are known by their names; one whose name is not known is taken by its place if it has to
    be given, and left alone if it has a default. If it takes N, as `minibatch_tokens`, `num_items_in_batch` or
    `total_tokens`, that is given and varied.

    Nothing is called but the step. What it prints goes nowhere, what it raises is reported, SystemExit too, and global
    state that it changes is set back: `global_state.py` says what is covered. Code that never returns, or that ends the
    process, is not held up.

    Args:
        step: called as `step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant)`, with
            log-probs `[B, T]`, float64 or, if it must be, float32, and a mask of the same shape. It may return `(loss,
            metadata)`, a longer tuple, a dict with "loss", or the loss alone, as a tensor or a number.
        seed: of log-probs, masks and counts.

    Raises:
        TypeError: the step cannot be called, or the seed is no integer.
        KeyboardInterrupt: it passes through.

    Example:
        >>> def step(log_probs, mask, steps, constant=1.0):
        ...     loss = -(log_probs * mask).sum() / constant / steps
        ...     loss.backward()
        ...     return loss, {}
        >>> found = audit_step(step)
        >>> found.rule, found.formula, found.problems
        ('microbatch_mean', 'c·G', ('loss-attached',))
    """
    if not callable(step):
        raise TypeError(f"step: got {printable(repr(step))} ({type(step).__name__}); expected a function")
    if type(seed) is not int:
        raise TypeError(f"seed: got {seed!r} ({type(seed).__name__}); expected an integer")
    with random_state_kept(), plain_settings():
        return _Audit(step, seed).run()


class _Audit:
    """One audit: the probe, its cases, and what was found."""

    def __init__(self, step: Callable[..., object], seed: int) -> None:
        self.probe, self.cases = Probe(step), Cases(seed)
        self.found: dict[str, str] = {}

    def run(self) -> StepAudit:
        case = self.cases.first
        first = self.probe.fit(case)
        if first.error:
            why = unknown(self.probe.step)
            self._note([("raises", f"However it was called. With {case}: {first.error}{why and f'.{why}'}")])
            return self._report(None, NOT_MEASURED)
        if self.probe.refused:
            self._note([("raises", self.probe.refused)])
        self._note(findings.returned_and_changed([first]))
        if findings.arrived(first) is None:
            self._note(findings.no_gradient(first))
            return self._report(None, "no gradient")
        self._note(findings.not_finite(case, first))
        if "not-finite" in self.found:
            return self._report(None, NOT_MEASURED)
        return self._report(*self._measure(case, first))

    def _measure(self, case: Case, first: Outcome) -> tuple[str | None, str]:
        """Rule and formula; what else there is to find is noted on the way."""
        form, gradient = self.probe.form, findings.arrived(first)
        repeated = self._calls([case])
        has_constant, has_tokens = form.takes("constant"), form.takes("tokens")
        varied = [(case, first), *self._calls(self.cases.varied(has_constant, has_tokens))]
        full = self._calls([self.cases.full()])
        edges = self._calls(self.cases.edges(form.may_omit_constant, form.default_constant))
        other = self._calls([self.cases.with_other_log_probs(case)])
        empty = [(case, self.probe(case)) for case in self.cases.empty()]
        repeated += self._calls([case])
        outcomes = [outcome for _, outcome in (*varied, *full, *edges)]
        self._note(findings.returned_and_changed(outcomes))
        self._note(findings.not_deterministic([first, *(outcome for _, outcome in repeated)]))
        if "not-deterministic" in self.found:
            return None, "not the same twice"
        self._note(findings.missing_gradient([*varied, *edges]))
        self._note(findings.tokens([*varied, *full]))
        self._note(findings.earlier_gradient(self.probe, case, first, self.cases.earlier_gradient()))
        if not {"overwrites-grad", "scales-grad"} & {*self.found}:  # they explain why parameters get nothing
            self._note(findings.parameters(self.probe, case, gradient))
        self._note(findings.empty_masks(empty, first))
        for _, outcome in other:
            self._note(findings.log_prob_weights(gradient, findings.arrived(outcome)))
        if "uneven-weights" in self.found:
            self.found.pop("sequences-missing", None)  # a few tokens that all weigh nothing
            return None, _UNEVEN
        coarse = findings.coarse_dtype([*varied, *full, *edges])
        if "scales-grad" in self.found and findings.is_scaled([*varied, *edges]):
            return None, _SCALED
        rule, formula = self._name(_points(varied), edges, empty, coarse)
        if not formula.startswith(_COARSE):  # or the loss is rounded too
            self._note(findings.losses([*varied, *edges], self._with_other_log_probs))
        return rule, formula

    def _with_other_log_probs(self, case: Case) -> Call:
        other = self.cases.with_other_log_probs(case)
        return other, self.probe(other)

    def _calls(self, cases: Iterable[Case]) -> list[tuple[Case, Outcome]]:
        """Call the step with each case, and keep the calls in which it did not raise and the gradient is finite."""
        kept = []
        for case in cases:
            outcome = self.probe(case)
            problem = [("raises", f"With {case}: {outcome.error}")] if outcome.error else []
            problem += findings.not_finite(case, outcome)
            self._note(problem)
            kept += [] if problem else [(case, outcome)]
        return kept

    def _name(
        self, points: list[Point], edges: Sequence[Call], empty: Sequence[Call], coarse: str | None
    ) -> tuple[str | None, str]:
        """The rule and formula of what was measured; `coarse` is the dtype that it is rounded to, if any."""
        # The centre of all series is a sequence with the reference length, which every case has.
        points.sort(key=lambda point: point.counts["n_b"] != self.cases.reference)
        if not self._was_varied(points):
            return None, NOT_MEASURED
        found = recover(points, SYMBOLS)
        if found.predict is None and coarse:
            return None, f"{_COARSE} {coarse}"
        if found.predict is None and _differs_within_a_case(points):
            self._note([("uneven-weights", "Sequences differ in weight, and not by a power of their token counts.")])
            return None, _UNEVEN
        self._note(findings.padding(points))
        self._note(findings.ignored(points, self.probe.form.takes))
        if found.predict is None:
            return None, found.formula
        for case, outcome in edges:
            odd = _first_off(found, _points([(case, outcome)]))
            if odd is not None:
                measured = _UNEVEN if isnan(odd.value) else number(odd.value)
                return None, _exception(found, f"{measured} at {case.in_short}")
        return self._name_with_empty_sequences(found, empty)

    def _name_with_empty_sequences(self, found: Denominator, empty: Sequence[Call]) -> tuple[str | None, str]:
        """Rule and formula once it is known whether a sequence without response tokens counts in B."""
        finite = [call for call in empty if call[1].gradient is not None and call[1].gradient.isfinite().all()]
        if _first_off(found, _points(finite)) is None:
            rule = rule_of(found.powers, found.factor) if found.powers is not None else None
            if rule is not None and not {"G", "N"} & {*found.powers}:  # a rule with a name may leave G to somebody else
                self.found.pop("steps-ignored", None)
            return rule, found.formula
        if found.powers is not None and _first_off(found, _points(finite, trained_rows=True)) is None:
            powers = {TRAINED_ROWS if symbol == "B" else symbol: power for symbol, power in found.powers.items()}
            return None, product_text(powers, found.factor)
        return None, _exception(found, "not beside a sequence without response tokens")

    def _was_varied(self, points: list[Point]) -> bool:
        """Whether the step ran often enough for the effect of each count to be known."""
        takes = self.probe.form.takes
        given = ["n", "B", "T", "G", *(["c"] if takes("constant") else []), *(["N"] if takes("tokens") else [])]
        return bool(points) and all(len(series(points, symbol)) >= _FEWEST for symbol in given)

    def _note(self, new: Iterable[findings.Finding]) -> None:
        """Keep the first evidence of each problem."""
        for code, detail in new:
            self.found.setdefault(code, detail)

    def _report(self, rule: str | None, formula: str) -> StepAudit:
        problems = tuple(code for code in PROBLEMS if code in self.found)
        return StepAudit(
            name=name_of(self.probe.step),
            rule=rule,
            formula=formula,
            problems=problems,
            details={code: self.found[code] for code in problems},
            consequence=consequence_of(rule, problems, formula),
            calls=self.probe.calls,
        )


def _points(calls: Iterable[Call], trained_rows: bool = False) -> list[Point]:
    """One measurement for each trained sequence; NaN for a call whose tokens do not count alike."""
    points = []
    for case, outcome in calls:
        gradient = findings.arrived(outcome)
        weights = [] if gradient is None else sequence_weights(gradient, case.mask)
        weights = [nan] * len(case.mask) if isinstance(weights, str) else weights
        counted = [(case.counts(row, trained_rows), weight) for row, weight in enumerate(weights) if weight]
        points += [Point(counts, 1 / abs(weight)) for counts, weight in counted if counts["n_b"]]
    return points


def _first_off(found: Denominator, points: Iterable[Point]) -> Point | None:
    """The first measurement that the formula does not give."""
    return next((p for p in points if not abs(p.value - found.predict(p.counts)) <= TOLERANCE * p.value), None)


def _exception(found: Denominator, but: str) -> str:
    """The formula with the one kind of case that it does not hold for."""
    return f"{found.formula.removesuffix(NOT_A_PRODUCT).rstrip()}, but {but} {NOT_A_PRODUCT}"


def _differs_within_a_case(points: Iterable[Point]) -> bool:
    """Whether sequences of one microbatch have different denominators."""
    seen: dict[tuple, float] = {}
    for counts, value in points:
        case = tuple(count for symbol, count in counts.items() if symbol != "n_b")
        if abs(seen.setdefault(case, value) - value) > TOLERANCE * value:
            return True
    return False
