"""Which full-batch gradient does this accumulation loop compute, anybody's loop, and does the split matter?

A minibatch is cut into microbatches in every way, and each accumulated gradient is held against full-batch gradients
that plain autograd computed without the loop. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from sft_edu.accumulate import Batch, _num_sequences, _parameters, compare
from sft_edu.audit.accumulation_report import (
    LOOP_PROBLEMS,
    OBJECTIVES,
    RULE_POWERS,
    AccumulationAudit,
    Counterexample,
    loop_consequence,
)
from sft_edu.audit.denominator import TOLERANCE, product_text, recover
from sft_edu.audit.loop_probe import SYMBOLS, LoopProbe, Run, compositions, model_kept
from sft_edu.audit.words import name_of, printable
from sft_edu.global_state import plain_settings, random_state_kept
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch


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

    def run(self) -> AccumulationAudit:
        whole = self._run(range(self.total), [self.total])
        if whole.gradient is None:
            self._look_for_a_skipped_microbatch()
            return self._report("no gradient" if "no-backward" in self.found else "not measured")
        splits = [self._run(range(self.total), sizes) for sizes in compositions(self.total)]
        if not _same(splits[0], whole):
            self._note("not-deterministic", f"Two runs with the split {[self.total]} left different gradients.")
            return self._report("not the same twice")
        neighbours = [
            self._run(range(start, start + count), sizes)
            for count in range(2, min(4, self.total))
            for start in range(self.total - count + 1)
            for sizes in compositions(count)
        ]
        runs = [run for run in (*neighbours, *splits) if run.gradient is not None]
        objective = self._first_match(OBJECTIVES, runs)
        rule, powers, formula = self._name(runs)
        self._look_at_partial_windows()
        self._look_at_empty_masks(powers)
        errors = {
            name: max(self._distance(run, powers) for run in runs if len(run.rows) == self.total)
            for name, powers in OBJECTIVES.items()
        }
        return self._report(formula, objective, rule, errors, self._counterexample(runs))

    def _look_for_a_skipped_microbatch(self) -> None:
        """A loop that leaves out the first or last microbatch trains nothing where there is only one."""
        ones = [1] * self.total
        if "no-backward" in self.found and self.probe(range(self.total), ones, ()).gradient is not None:
            del self.found["no-backward"]
            self._note(
                "sequences-missing", f"With the split {[self.total]} nothing is trained, with {ones} something is."
            )

    def _run(self, rows: Sequence[int], sizes: Sequence[int], cleared: Sequence[int] = ()) -> Run:
        """One run of the loop; what it does besides leaving a gradient is noted."""
        run = self.probe(rows, sizes, cleared)
        if run.error:
            self._note("raises", f"With the split {list(sizes)}: {run.error}")
        if "parameters" in run.changed:
            self._note("changes-parameters", f"With the split {list(sizes)} they were other numbers afterwards.")
        columns = [name for name in run.changed if name != "parameters"]
        if columns:
            self._note("mutates-input", f"Afterwards {', '.join(columns)} had other values than before.")
        if run.gradient is not None and not run.gradient.isfinite().all() and not cleared:
            self._note("uneven-weights", f"With the split {list(sizes)} the gradient is not finite.")
            return replace(run, gradient=None)
        if run.gradient is None and not run.error and not cleared and "parameters" not in run.changed:
            used = any(parameter.grad is not None for parameter in self.given.parameters())
            other = " One is in the model outside: use the one that the loop is given." if used else ""
            self._note("no-backward", f"With the split {list(sizes)} .grad is None or 0 afterwards.{other}")
        return run

    # --- Names ---

    def _distance(self, run: Run, powers: Mapping[str, int]) -> float:
        return compare(run.gradient, self.probe.predict(run, powers)).relative_error

    def _first_match(self, named: Mapping[str, Mapping[str, int]], runs: Iterable[Run]) -> str | None:
        fits = (name for name, powers in named.items() if all(self._distance(run, powers) <= TOLERANCE for run in runs))
        return next(fits, None)

    def _name(self, runs: Sequence[Run]) -> tuple[str | None, Mapping[str, int] | None, str]:
        """The rule that explains all gradients, the exponents of its counts, and its formula."""
        for named in (OBJECTIVES, RULE_POWERS):
            name = self._first_match(named, runs)
            if name is not None:
                return name if name in RULE_POWERS else None, named[name], product_text(named[name])
        self._look_at_weights(runs)
        if "uneven-weights" in self.found:
            return None, None, "not a fixed weight per token"
        # The centre of all series is the first sequence in a microbatch of its own: there G varies alone.
        points = [point for run in reversed(runs) for point in self.probe.points(run)]
        points.sort(key=lambda point: (point.counts["M"] < self.total, point.counts["B"] > 1))
        found = recover(points, SYMBOLS)
        named = [*OBJECTIVES.items(), *RULE_POWERS.items()]
        name = next((name for name, powers in named if (found.powers, found.factor) == (powers, 1)), None)
        return name if name in RULE_POWERS else None, None, found.formula

    def _look_at_weights(self, runs: Sequence[Run]) -> None:
        """Why no rule fits: which sequences and tokens are trained, and in which direction."""
        for run in runs:
            where, found = f"With the split {list(run.sizes)}", self.probe.weights(run)
            if found is None:
                self._note("uneven-weights", f"{where} the tokens of a sequence have different weights.")
                continue
            weights, outside = found
            if any(outside):
                alike = all(abs(w - weights[i % len(weights)]) <= 1e-4 * abs(w) for i, w in enumerate(outside) if w)
                every = alike and all(w for w, there in zip(outside, self.probe.has_outside(run), strict=True) if there)
                self._note(
                    "mask-ignored" if every else "prompt-tokens-trained", f"{where} other tokens are trained too."
                )
            if not all(weights):
                missing = [row for row, weight in zip(run.rows, weights, strict=True) if not weight]
                self._note("sequences-missing", f"{where} nothing comes from sequence {', '.join(map(str, missing))}.")
            if min(weights) < 0 < max(weights):
                self._note("uneven-weights", f"{where} some sequences are made more likely, others less.")
            elif max(weights) <= 0:
                self._note("wrong-sign", f"{where} the gradient is that of +log p.")

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
                found = Counterexample(lengths, run.sizes, _error(run, reference))
                self._note("depends-on-split", f"Smallest counterexample: {found}")
                return found
        return None

    def _look_at_partial_windows(self) -> None:
        """Fewer microbatches than before, each as large as before: the objective must not change."""
        steps = self.total // 2
        full, *partial = (self._run(range(2 * count), [2] * count) for count in range(steps, 0, -1))
        for name, powers in OBJECTIVES.items():
            if full.gradient is None or self._distance(full, powers) > TOLERANCE:
                continue
            for run in partial:
                if run.gradient is not None and self._distance(run, powers) > TOLERANCE:
                    ratio = compare(run.gradient, self.probe.predict(run, powers)).ratio
                    self._note(
                        "partial-window",
                        f"{steps} microbatches of 2 sequences give {name}, {len(run.sizes)} give {ratio:.4g} times it.",
                    )

    def _look_at_empty_masks(self, powers: Mapping[str, int] | None) -> None:
        """A microbatch without response tokens; it may count among the others or not."""
        sizes = [1, 1, self.total - 2] if self.total > 2 else [1, 1]
        where = f"With the split {sizes} and no response token in the second microbatch"
        run = self._run(range(self.total), sizes, cleared=[1])
        if run.gradient is not None and not run.gradient.isfinite().all():
            self._note("nan-on-empty-mask", f"{where} the gradient is not finite.")
        elif powers is not None and not run.error:
            without = Run((0, *run.rows[2:]), (run.lengths[0], *run.lengths[2:]), (1, *sizes[2:]))
            expected = [self.probe.predict(one, powers) for one in (run, without)]
            gradient = expected[0] * 0 if run.gradient is None else run.gradient
            error = min(compare(gradient, one).relative_error for one in expected)
            if error > TOLERANCE:
                self._note("wrong-on-empty-mask", f"{where} the gradient is {error:.2%} off.")

    def _note(self, code: str, detail: str) -> None:
        self.found.setdefault(code, detail)

    def _report(self, formula, objective=None, rule=None, errors=None, counterexample=None) -> AccumulationAudit:
        problems = tuple(code for code in LOOP_PROBLEMS if code in self.found)
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
            consequence=loop_consequence(objective, rule, problems),
            runs=self.probe.runs,
        )


def _error(run: Run, reference: Run) -> float:
    return compare(run.gradient, reference.gradient).relative_error


def _same(run: Run, reference: Run) -> bool:
    return run.gradient is not None and reference.gradient is not None and _error(run, reference) <= TOLERANCE
