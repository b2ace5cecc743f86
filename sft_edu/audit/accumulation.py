"""Which full-batch gradient does this accumulation loop compute, anybody's loop, and does the split matter?

A minibatch is cut into microbatches in every way, and each accumulated gradient is held against full-batch gradients
that plain autograd computed without the loop. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from sft_edu.accumulate import Batch, _num_sequences, _parameters, compare
from sft_edu.audit import loop_findings
from sft_edu.audit.accumulation_report import (
    LOOP_PROBLEMS,
    NAMED,
    OBJECTIVES,
    RULE_POWERS,
    AccumulationAudit,
    Counterexample,
    loop_consequence,
)
from sft_edu.audit.denominator import NOT_DETERMINED, TOLERANCE, Denominator, product_text, recover
from sft_edu.audit.findings import Finding
from sft_edu.audit.loop_findings import distance
from sft_edu.audit.loop_probe import SYMBOLS, LoopProbe, Powers, Run, compositions, model_kept
from sft_edu.audit.loop_weights import Weights, points_of, weights_of
from sft_edu.audit.words import name_of, printable
from sft_edu.global_state import plain_settings, random_state_kept
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch

_UNMEASURED = {
    "clipped": "not measured: the gradient is clipped",
    "uneven-weights": "not a fixed weight per token",
    "foreign-gradient": "no sum over tokens",
}
"""Codes with which there is no denominator, and what stands in its place."""


def audit_accumulation(
    run_minibatch: Callable[..., object], model: nn.Module | None = None, minibatch: Batch | None = None
) -> AccumulationAudit:
    """Measure which full-batch gradient a loop over microbatches accumulates, and whether the split matters.

    The loop runs once for every way of cutting the minibatch into microbatches of consecutive sequences, 128 for eight
    sequences (for more than eight, equal microbatches and single cuts), for every two and three neighbours, for windows
    with fewer microbatches, and with a microbatch whose mask is empty. It always gets a fresh float64 copy of the
    model, in eval mode, and copies of the sequences. Parameters, buffers and `.grad` of the given model are afterwards
    what they were, also if the loop uses that model by another name. Global state is kept as in `audit_step`.

    Gradients are equal up to 2e-6 relative. A loop that is right in float64 is right to 1e-14, one that computes in
    float32 to about 2e-7, and a wrong denominator is off by about one part in the number of tokens.

    Args:
        run_minibatch: called as `run_minibatch(model, microbatches)`; runs forward and backward for each microbatch and
            leaves the accumulated gradient in `.grad`, without stepping an optimizer. `microbatches` is a list of dicts
            with `input_ids`, `labels` and `response_mask`, each `[B, T]`; its length is G. What the loop returns is not
            looked at.
        model: a small one; a `TinyLM` of 15,696 parameters when None. See `full_batch_gradient`.
        minibatch: at least two sequences with response tokens, not all of the same number; eight when None. See
            `split_minibatch`.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
        KeyboardInterrupt: it passes through.
    """
    if not callable(run_minibatch):
        given = f"{printable(repr(run_minibatch))} ({type(run_minibatch).__name__})"
        raise TypeError(f"run_minibatch: got {given}; expected a function")
    model = TinyLM(d_model=16, num_layers=1, num_heads=2) if model is None else model
    minibatch = ragged_minibatch(8, imbalance=1.0) if minibatch is None else minibatch
    _parameters(model)
    _check_minibatch(minibatch)
    with random_state_kept(), plain_settings(), model_kept(model):
        return _LoopAudit(run_minibatch, model, minibatch).run()


def _check_minibatch(minibatch: Batch) -> None:
    _num_sequences(minibatch)
    tokens = (minibatch["response_mask"] != 0).sum(1).tolist()
    if len(set(tokens)) < 2 or min(tokens) < 1:
        raise ValueError(
            f"minibatch: got sequences of {', '.join(map(str, tokens))} response tokens; expected at least two, each "
            "with response tokens and not all with the same number, or a mean over tokens is a mean over sequences"
        )


class _LoopAudit:
    """One audit: the probe, and what was found."""

    def __init__(self, run_minibatch: Callable[..., object], model: nn.Module, minibatch: Batch) -> None:
        self.probe, self.given, self.name = LoopProbe(run_minibatch, model, minibatch), model, name_of(run_minibatch)
        self.total = len(self.probe.lengths)
        self.found: dict[str, str] = {}
        self.trained = False

    def run(self) -> AccumulationAudit:
        whole = self._run(range(self.total), [self.total])
        if whole.gradient is None:
            self._look_for_a_skipped_microbatch()
            return self._report("no gradient" if "no-backward" in self.found else "not measured")
        splits = [self._run(range(self.total), sizes) for sizes in compositions(self.total)]
        if not _same(splits[0], whole):
            self._note([("not-deterministic", f"Two runs with the split {[self.total]} left different gradients.")])
            return self._report("not the same twice")
        neighbours = [
            self._run(range(start, start + count), sizes)
            for count in range(min(2, self.total - 1), min(4, self.total))
            for start in range(self.total - count + 1)
            for sizes in compositions(count)
        ]
        runs = [run for run in (*neighbours, *splits) if run.gradient is not None]
        named = self._explaining(runs)
        if len({tuple(sorted(powers.items())) for _, powers in named}) > 1:
            found = Denominator(f"{NOT_DETERMINED}: {' and '.join(name for name, _ in named)} agree with all of them")
        else:
            found = Denominator(product_text(named[0][1]), named[0][1], 1.0) if named else self._unnamed(runs)
        if "clipped" not in self.found:  # or the clipping is what a partial window shows
            self._look_at_partial_windows()
        formula = self._look_at_empty_masks(named[0][1] if found.powers and named else None) or found.formula
        return self._report(formula, found, self._errors(runs), self._counterexample(runs), bool(named))

    def _look_for_a_skipped_microbatch(self) -> None:
        """A loop that leaves out the first or last microbatch trains nothing where there is only one."""
        ones = [1] * self.total
        if "no-backward" in self.found and self.probe(range(self.total), ones).gradient is not None:
            del self.found["no-backward"]
            detail = f"With the split {[self.total]} nothing is trained, with {ones} something is."
            self._note([("sequences-missing", detail)])

    def _run(
        self, rows: Sequence[int], sizes: Sequence[int], cleared: Sequence[int] = (), columns: int | None = None
    ) -> Run:
        """One run of the loop; what it does besides leaving a gradient is noted."""
        run = self.probe(rows, sizes, cleared, columns)
        self.trained |= run.gradient is not None
        self._note(loop_findings.during(run, self.given, bool(cleared)))
        is_bad = run.gradient is not None and not cleared and not run.gradient.isfinite().all()
        return replace(run, gradient=None) if is_bad else run

    # --- Names ---

    def _explaining(self, runs: Sequence[Run]) -> list[tuple[str, Powers]]:
        """The objectives and rules that give every one of the gradients."""
        return [
            (name, powers)
            for name, powers in NAMED
            if all(distance(self.probe, run, powers) <= TOLERANCE for run in runs)
        ]

    def _unnamed(self, runs: Sequence[Run]) -> Denominator:
        """A denominator that is no known one, or whose gradients are of other tokens, or of another sign."""
        self._note(loop_findings.clipping(self.probe, runs))
        if "clipped" not in self.found:
            runs = [*runs, *self._narrower_runs()]
        measured = [(run, weights_of(self.probe, run)) for run in runs]
        self._note(loop_findings.trained_tokens(self.probe, measured, self.found))
        for code, formula in _UNMEASURED.items():
            if code in self.found:
                return Denominator(formula)
        if any(weights is None for _, weights in measured):
            return Denominator("not measured")
        if not all(weights.determined for _, weights in measured):
            return Denominator(f"{NOT_DETERMINED}: the model has fewer directions than there are sequences")
        found = self._recovered(measured)
        if found.predict is None:
            nearly = loop_findings.nearest(self.probe, runs)
            return Denominator(nearly) if nearly else self._of_one_microbatch(measured) or _explained(found)
        self._note(loop_findings.padding(found, self.probe.columns))
        if found.factor == self.probe.columns:  # always the same T, so that it looks like any number
            return replace(found, formula=f"{found.formula}, with T = {self.probe.columns} in every run")
        return found

    def _recovered(self, measured: Sequence[tuple[Run, Weights]], tokens: str = "n") -> Denominator:
        # The centre of all series is the first sequence in a microbatch of its own: there G varies alone.
        points = [point for run, weights in reversed(measured) for point in points_of(run, weights, tokens)]
        points.sort(key=lambda point: (point.counts["M"] < self.total, point.counts["B"] > 1))
        return recover(points, [tokens if symbol == "n" else symbol for symbol in SYMBOLS])

    def _of_one_microbatch(self, measured: Sequence[tuple[Run, Weights]]) -> Denominator | None:
        """A product in which the tokens of the first or of the last microbatch stand for those of each."""
        found = (self._recovered(measured, tokens) for tokens in ("n_first", "n_last"))
        return next((one for one in found if one.powers is not None), None)

    def _narrower_runs(self) -> Iterator[Run]:
        """Neighbours without the columns that only longer sequences need: there T is another."""
        for count in range(min(2, self.total - 1), min(4, self.total)):
            for start in range(self.total - count + 1):
                rows = range(start, start + count)
                columns = self.probe.narrower(rows)
                if columns is not None:
                    run = self._run(rows, [count], columns=columns)
                    yield from [run] if run.gradient is not None else []

    # --- What else can go wrong ---

    def _counterexample(self, runs: Iterable[Run]) -> Counterexample | None:
        """The fewest sequences in the fewest microbatches; runs are ordered so."""
        in_one = {}
        for run in runs:
            if len(run.sizes) == 1:
                in_one[run.rows] = run
            reference = in_one.get(run.rows)
            if reference is not None and not _same(run, reference):
                lengths = tuple(self.probe.lengths[row] for row in run.rows)
                found = Counterexample(lengths, run.sizes, compare(run.gradient, reference.gradient).relative_error)
                self._note([("depends-on-split", f"Smallest counterexample: {found}")])
                return found
        return None

    def _look_at_partial_windows(self) -> None:
        steps = self.total // 2
        full, *partial = (self._run(range(2 * count), [2] * count) for count in range(steps, 0, -1))
        self._note(loop_findings.partial_windows(self.probe, full, partial))

    def _look_at_empty_masks(self, powers: Powers | None) -> str | None:
        """A microbatch without response tokens, and a sequence without any in a larger one.

        Returns the formula where sequences without response tokens are not counted in it, otherwise None.
        """
        sizes = [1, 1, self.total - 2] if self.total > 2 else [1, 1]
        where = f"With the split {sizes} and no response token in the"
        places = {"second microbatch": 1} | ({"last sequence": self.total - 1} if self.total > 3 else {})
        runs = [self._run(range(self.total), sizes, cleared=[place]) for place in places.values()]
        for name, run in zip(places, runs, strict=True):
            self._note(loop_findings.empty_masks(self.probe, run, powers, f"{where} {name}"))
        if not loop_findings.leaves_out_empty(self.probe, runs, powers):
            return None
        return product_text({f"{symbol}{'_r' * (symbol in 'BM')}": power for symbol, power in powers.items()})

    def _errors(self, runs: Iterable[Run]) -> dict[str, float]:
        """For each objective the largest distance of a split of the whole minibatch."""
        whole = [run for run in runs if len(run.rows) == self.total]
        return {name: max(distance(self.probe, run, powers) for run in whole) for name, powers in OBJECTIVES.items()}

    def _note(self, new: Iterable[Finding]) -> None:
        """Keep the first evidence of each problem."""
        for code, detail in new:
            self.found.setdefault(code, detail)

    def _report(
        self,
        formula: str,
        found: Denominator | None = None,
        errors: Mapping[str, float] | None = None,
        counterexample: Counterexample | None = None,
        explained: bool = False,
    ) -> AccumulationAudit:
        if self.trained and "no-backward" in self.found:  # not always
            self._note([("sequences-missing", self.found.pop("no-backward"))])
        problems = tuple(code for code in LOOP_PROBLEMS if code in self.found)
        names = [name for name, powers in NAMED if found and (found.powers, found.factor) == (powers, 1)]
        objective = names[0] if explained and names and found.powers == OBJECTIVES.get(names[0]) else None
        rule = names[0] if names and names[0] in RULE_POWERS and "_r" not in formula else None
        multiple = next((n for n, powers in OBJECTIVES.items() if found and found.powers == powers), None)
        return AccumulationAudit(
            name=self.name,
            objective=objective,
            rule=rule,
            formula=formula,
            invariant=bool(errors) and counterexample is None,
            errors=errors or {},
            counterexample=counterexample,
            problems=problems,
            details={code: self.found[code] for code in problems},
            consequence=loop_consequence(objective, rule, problems, formula, multiple),
            runs=self.probe.runs,
        )


def _explained(found: Denominator) -> Denominator:
    """Of a table in which all counts stand: whose they are."""
    whose = "; n_b is of one sequence, n and B of its microbatch)"
    is_table = ", B = " in found.formula
    return replace(found, formula=found.formula.removesuffix(")") + whose) if is_table else found


def _same(run: Run, reference: Run) -> bool:
    if run.gradient is None or reference.gradient is None:
        return False
    return compare(run.gradient, reference.gradient).relative_error <= TOLERANCE
