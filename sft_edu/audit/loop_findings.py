"""The questions that an audit of a loop asks, one function each. Each yields problem codes with what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from sft_edu.accumulate import compare
from sft_edu.audit.accumulation_report import NAMED, OBJECTIVES
from sft_edu.audit.denominator import NOT_A_PRODUCT, TOLERANCE, Denominator, number, product_text
from sft_edu.audit.findings import Finding
from sft_edu.audit.loop_probe import LoopProbe, Powers, Run
from sft_edu.audit.loop_weights import Weights, is_sum_over_tokens
from sft_edu.audit.report import NOT_MEASURED

Measured = tuple[Run, Weights | None]

_SAME_LENGTH = 1e-4  # clip_grad_norm_ adds 1e-6 to the length it divides by
_SAME_DIRECTION = 1 - 1e-9
_LEFT_OUT = ("sequences", "microbatches")  # what `Run.counts` may leave out
_FEWEST = 3  # runs of one length: not by chance
_EACH = "Runs of several microbatches have another direction, as when every microbatch is clipped."
_ROUNDED = (2e-4, 1e-2)  # float16 has 11 bits, bfloat16 8; a few roundings add up


def distance(probe: LoopProbe, run: Run, powers: Powers, trained: str = "") -> float:
    """The relative error of a run, were D the product of these powers."""
    return compare(run.gradient, probe.predict(run, powers, trained)).relative_error


def during(run: Run, given: nn.Module, cleared: bool) -> Iterator[Finding]:
    """What a run did besides leaving a gradient. `given` is the model of the caller, not the copy."""
    where = _where(run)
    if run.error:
        yield "raises", f"{where}: {run.error}"
    if "parameters" in run.changed:
        yield "changes-parameters", f"{where} the parameters were other numbers afterwards."
    if "entries" in run.changed:
        yield "mutates-input", "Afterwards the list of microbatches, or a dict in it, had other entries than before."
    columns = [name for name in run.changed if name not in ("parameters", "entries")]
    if columns:
        yield "mutates-input", f"Afterwards {', '.join(columns)} had other values than before."
    if cleared:
        return
    if run.gradient is not None and not run.gradient.isfinite().all():
        yield "not-finite", f"{where} the gradient is not finite."
    if run.gradient is None and not run.error and "parameters" not in run.changed:
        used = any(parameter.grad is not None for parameter in given.parameters())
        other = " One is in the model outside: use the one that the loop is given." if used else ""
        yield "no-backward", f"{where} .grad is None or 0 afterwards.{other}"


def clipping(probe: LoopProbe, runs: Sequence[Run]) -> Iterator[Finding]:
    """Whether gradients end at one length, or at one largest value.

    Clipped by norm, a gradient keeps the direction of some denominator: where it is clipped once, at the end, in every
    run; where every microbatch is clipped, in those of one microbatch.
    """
    alone = [run for run in runs if len(run.sizes) == 1]
    for group, (name, powers) in itertools.product((runs, alone), NAMED):
        capped = _capped(probe, group, powers)
        if capped:
            when = _when(probe, runs, powers, capped) if group is runs else _EACH
            yield (
                "clipped",
                f"It is clipped by norm: in {len(capped)} of {len(group)} runs, the first {_where(capped[0]).lower()}, "
                f"the gradient has the direction of {name} and the length {_length(capped[0]):.4g}, which none "
                f"exceeds. {when}",
            )
            return
    for size, unit in ((_length, "norm"), (_peak, "value")):
        values = [size(run) for run in alone]
        same = [value for value in values if value >= max(values) * (1 - _SAME_LENGTH)]
        if len(same) >= _FEWEST:
            what = "length" if unit == "norm" else "largest value"
            yield (
                "clipped",
                f"It is clipped by {unit}: for {len(same)} of {len(alone)} sets of sequences, in one microbatch each, "
                f"the gradient has the {what} {max(values):.4g}.",
            )


def _capped(probe: LoopProbe, runs: Sequence[Run], powers: Powers) -> list[Run]:
    """The runs that are shorter than this D makes them, if all have one length, and the others are as D makes them."""
    off = [run for run in runs if distance(probe, run, powers) > TOLERANCE]
    longest = max(map(_length, runs))
    for run in off:
        found = compare(run.gradient, probe.predict(run, powers))
        if found.cosine < _SAME_DIRECTION or found.ratio >= 1 or _length(run) < longest * (1 - _SAME_LENGTH):
            return []
    return off


def _when(probe: LoopProbe, runs: Sequence[Run], powers: Powers, capped: Sequence[Run]) -> str:
    """Clipping inside would have turned a run whose first microbatches alone exceed the length."""
    for run in runs:
        for rows in list(itertools.accumulate(run.sizes))[:-1]:
            if probe.predict(run, powers, rows=rows).norm().item() > _length(capped[0]) * (1 + _SAME_LENGTH):
                return "That happens once, after the last microbatch."
    return "Whether once or after every microbatch, these runs do not show."


def _length(run: Run) -> float:
    return run.gradient.norm().item()


def _peak(run: Run) -> float:
    return run.gradient.abs().max().item()


def nearest(probe: LoopProbe, runs: Sequence[Run]) -> str:
    """What to say for a formula where a known rule is nearly right: after rounding, or with few exceptions. Else ""."""
    for name, powers in NAMED:
        off = [run for run in runs if distance(probe, run, powers) > TOLERANCE]
        if _ROUNDED[0] < max(distance(probe, run, powers) for run in runs) < _ROUNDED[1]:
            return f"{NOT_MEASURED}: within 1% of {name}, as after rounding to 16 bits"
        if 0 < len(off) <= len(runs) / 4:
            rows = " and ".join(filter(None, (", ".join(map(str, off[0].rows[:-1])), str(off[0].rows[-1]))))
            text = f"{product_text(powers)}, but not {_where(off[0]).lower()} of sequences {rows}"
            return f"{text} {NOT_A_PRODUCT}"
    return ""


def trained_tokens(probe: LoopProbe, measured: Sequence[Measured], found: Mapping[str, str]) -> Iterator[Finding]:
    """Which sequences and tokens are trained, in which direction; `found` has what is known already."""
    yield from _leak([(run, weights) for run, weights in measured if weights is not None and weights.leak])
    for run, weights in measured:
        if weights is not None and weights.determined:
            yield from _weights(run, weights.response, "clipped" in found)
    unexplained = [run for run, weights in measured if weights is None]
    if unexplained and not {"clipped", "changes-parameters", "uneven-weights"} & {*found}:
        yield _unexplained(probe, min(unexplained, key=lambda run: sum(run.lengths)))


def _leak(leaking: Sequence[tuple[Run, Weights]]) -> Iterator[Finding]:
    """Not every run has prompts and padding, so the mask is ignored if it is in all of those with a leak."""
    partly = [(run, weights) for run, weights in leaking if not weights.mask_is_ignored]
    if partly:
        run, weights = max(partly, key=lambda one: one[1].leak)
        share = f"at most {number(weights.leak)} times the weight of those under it"
        yield "prompt-tokens-trained", f"{_where(run)} tokens outside the mask are trained too, with {share}."
    elif leaking:
        yield "mask-ignored", f"{_where(leaking[0][0])} the tokens outside the mask are trained as much as the others."


def _weights(run: Run, response: Sequence[float], is_clipped: bool) -> Iterator[Finding]:
    if not all(response) and not is_clipped:  # clipped again and again, a gradient is next to nothing
        missing = [row for row, weight in zip(run.rows, response, strict=True) if not weight]
        yield "sequences-missing", f"{_where(run)} nothing comes from sequence {', '.join(map(str, missing))}."
    if min(response) < 0 < max(response):
        yield "uneven-weights", f"{_where(run)} some sequences are made more likely, others less."
    elif max(response) <= 0:
        yield "wrong-sign", f"{_where(run)} the gradient is that of +log p."


def _unexplained(probe: LoopProbe, run: Run) -> Finding:
    explained = is_sum_over_tokens(probe, run)
    if explained:
        return "uneven-weights", f"{_where(run)} the tokens of one sequence have different weights."
    if explained is None:
        unsure = "the tokens of one sequence differ in weight, or something else is trained"
        return "uneven-weights", f"{_where(run)} {unsure}."
    return "foreign-gradient", f"{_where(run)} no weights of its tokens add up to the gradient."


def _where(run: Run) -> str:
    return f"With the split {list(run.sizes)}"


def padding(found: Denominator, columns: int) -> Iterator[Finding]:
    if found.powers and "T" in found.powers:
        yield "padding-counted", f"Rows with fewer than T = {columns} positions get another weight."


def partial_windows(probe: LoopProbe, full: Run, partial: Sequence[Run]) -> Iterator[Finding]:
    """Fewer microbatches than before, each as large as before: the objective must not change."""
    for name, powers in OBJECTIVES.items():
        if full.gradient is None or distance(probe, full, powers) > TOLERANCE:
            continue
        for run in partial:
            if run.gradient is not None and distance(probe, run, powers) > TOLERANCE:
                ratio = compare(run.gradient, probe.predict(run, powers)).ratio
                yield (
                    "partial-window",
                    f"{len(full.sizes)} microbatches of 2 sequences give {name}, {len(run.sizes)} give {ratio:.4g} "
                    "times it.",
                )


def empty_masks(probe: LoopProbe, run: Run, powers: Powers | None, where: str) -> Iterator[Finding]:
    """Of a run in which a microbatch, or a sequence, has no response tokens; it may count among the others or not."""
    if run.gradient is not None and not run.gradient.isfinite().all():
        yield "nan-on-empty-mask", f"{where} the gradient is not finite."
    elif powers is not None and not run.error:
        ways = ("", *_LEFT_OUT)
        left = replace(run, gradient=probe.predict(run, powers) * 0) if run.gradient is None else run
        error = min(distance(probe, left, powers, trained) for trained in ways)
        if error > TOLERANCE:
            yield "wrong-on-empty-mask", f"{where} the gradient is {error:.2%} off."


def leaves_out_empty(probe: LoopProbe, runs: Sequence[Run], powers: Powers | None) -> bool:
    """Whether sequences without response tokens are not counted in B and M."""
    if powers is None or not {"B", "M"} & {*powers} or any(run.gradient is None for run in runs):
        return False
    fits = {way: all(distance(probe, run, powers, way) <= TOLERANCE for run in runs) for way in ("", *_LEFT_OUT)}
    return not fits[""] and any(fits.values())
