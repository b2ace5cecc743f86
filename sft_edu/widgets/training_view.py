"""What the training lab shows of a run: panels, lines, answers, words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sft_edu.digits import fixed
from sft_edu.training.train import Record
from sft_edu.widgets.training_run import TrainingRun

X_TITLE = "sequences seen, in thousands"
_SEEN = 1000
_POINTS = 400  # of a line, at most
_NLL, _GRADIENT, _RIGHT = range(3)  # the panels

# Verdicts on what was trained: a number would not be the same on another machine.
_FALL = ((0.1, "less than a tenth of"), (0.5, "less than half of"), (0.9, "less than"), (1.1, "about"))
_SHARE = ((0, "none is right"), (0.1, "hardly any is right"), (0.5, "less than half are right"))


def panels(run: TrainingRun, before: TrainingRun | None, asked: str) -> list[dict]:
    """Titles, numbers as they are now, and axes that hold this run and the one before."""
    runs = [one for one in (run, before) if one]
    scores, record = run.looks[-1].scores, run.records[-1] if run.records else None
    nlls = [nll for one in runs for nll in (one.looks[0].scores.nll, *(r.nll for r in _thinned(one.records)))]
    norms = [norm for one in runs for r in _thinned(one.records) for norm in (r.grad_norm, r.clipped_norm) if norm > 0]
    low, high = math.floor(math.log10(min(norms, default=1))), math.ceil(math.log10(max(norms, default=1)))
    return [
        {
            "title": "NLL per token, nats",
            "text": fixed(record.nll) if record else "",
            "limits": [0, max(6, math.ceil(max(nlls)))],
            "log": False,
        },
        {
            "title": "gradient norm",
            "text": f"{fixed(record.grad_norm)} → {fixed(record.clipped_norm)}" if record else "",
            "limits": [10.0 ** min(low, -2), 10.0 ** max(high, 1)],
            "log": True,
        },
        {
            "title": f"{asked} answers right, %",
            "text": f"{100 * scores.exact_match:.1f} %",
            "limits": [0, 100],
            "log": False,
        },
    ]


def lines(run: TrainingRun, asked: str) -> list[dict]:
    rule, records = run.settings["rule"], _thinned(run.records)
    held_out = [(look.seen, look.scores.nll) for look in run.looks]
    return [
        _line(_NLL, "training", rule, ((run.seen_after(r.step), r.nll) for r in records)),
        _line(_NLL, "held out" if asked == "held-out" else "all of them", "held_out", held_out),
        _line(_GRADIENT, "unclipped", "gradient", ((run.seen_after(r.step), r.grad_norm) for r in records)),
        _line(_GRADIENT, "clipped", "clipped", ((run.seen_after(r.step), r.clipped_norm) for r in records)),
        _line(_RIGHT, "this run", rule, ((look.seen, 100 * look.scores.exact_match) for look in run.looks)),
    ]


def lines_before(run: TrainingRun | None) -> list[dict]:
    """The same of an earlier run, fewer of them."""
    if run is None:
        return []
    kept = [line for line in lines(run, "") if line["look"] not in ("held_out", "clipped")]
    return [line | {"label": "run before", "look": "before"} for line in kept]


def end(run: TrainingRun, before: TrainingRun | None) -> float:
    """Of the horizontal axis: a round number that holds both runs, and at last the whole run."""
    seen = max(run.training.minibatch_size, *(one.seen for one in (run, before) if one))
    power = 10 ** math.floor(math.log10(seen))
    rounded = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= seen)
    return min(rounded, max(run.num_sequences, seen)) / _SEEN


def status(run: TrainingRun, running: bool, tokens_per_second: float) -> str:
    """What changes all the time, and is never compared."""
    training = run.training
    state = "running" if running else "stopped" if run.error else "finished" if run.finished else "paused"
    begun = running or run.finished or training.step or training.microbatch
    parts = [
        f"{state if begun else 'ready'} on {training.device.type}",
        f"step {training.step} of {training.num_steps}",
    ]
    if not running and training.microbatch:
        parts.append(f"{training.microbatch} of {len(training.minibatch())} microbatches of the next")
    parts += [f"{run.seen:,} sequences", f"{run.num_tokens:,} tokens trained on"]
    if tokens_per_second:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    return " · ".join(parts)


def answer_rows(run: TrainingRun) -> list[dict]:
    return [
        {"prompt": a.prompt.strip(), "answer": a.answer, "wanted": a.expected, "right": a.is_right}
        for a in run.looks[-1].scores.answers
    ]


def counts(run: TrainingRun) -> str:
    """What is the same on every machine."""
    training = run.training
    return (
        f"Step {training.step:,} of {training.num_steps:,}: {run.seen:,} of {run.num_sequences:,} sequences, "
        f"{run.num_tokens:,} tokens trained on."
    )


def verdicts(run: TrainingRun, asked: str) -> str:
    """What has come of it, in words that are the same on every machine."""
    if not run.records:
        return f"Nothing is trained yet: of {run.num_asked} {asked} answers {_right(run)}."
    fall = run.looks[-1].scores.nll / run.looks[0].scores.nll
    share = next((words for limit, words in _FALL if fall < limit), "more than")
    clipped = sum(record.clipped_norm < record.grad_norm for record in run.records)
    which = "every gradient" if clipped == len(run.records) else "some gradients" if clipped else "no gradient"
    answers = f"Of {run.num_asked} {asked} answers {_right(run)}; their NLL is {share} what it was."
    return f"{answers} Clipping shortened {which}."


def _right(run: TrainingRun) -> str:
    share = run.looks[-1].scores.exact_match
    if share >= 0.99:
        return "all are right" if run.num_asked < 100 else "at least 99 % are right"
    return next((words for limit, words in _SHARE if share <= limit), "more than half are right, but not 99 %")


def _line(panel: int, label: str, look: str, points: Iterable[tuple[int, float]]) -> dict:
    """Five digits are finer than any screen, and travel light."""
    rounded = [[seen / _SEEN, float(f"{value:.5g}")] for seen, value in points if math.isfinite(value)]
    return {"panel": panel, "label": label, "look": look, "points": rounded}


def _thinned(records: Sequence[Record]) -> list[Record]:
    """Every second, fourth, eighth and so on, and the last: points that are drawn stay where they are."""
    records = records[:]  # another thread may append
    stride = 1
    while len(records) > _POINTS * stride:
        stride *= 2
    return records[::stride] + (records[-1:] if (len(records) - 1) % stride else [])
