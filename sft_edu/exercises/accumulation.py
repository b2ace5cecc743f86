"""Check a learner's loop over the microbatches of one optimizer step: one telling split, and then the audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sft_edu.accumulate import Batch, compare, full_batch_gradient, split_minibatch
from sft_edu.audit.accumulation import audit_accumulation
from sft_edu.audit.accumulation_report import LOOP_PROBLEMS
from sft_edu.audit.denominator import TOLERANCE
from sft_edu.course.progress import remembered
from sft_edu.exercises.accumulation_mistakes import gradient_problem
from sft_edu.exercises.guard import call, judged, reading, smallest
from sft_edu.exercises.verdict import NOT_STARTED, Verdict, right, wrong
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch

_SIZES = (3, 1, 2)  # no two microbatches agree in sequences or in response tokens
_SMALL = ((1,), (1, 1), (2, 1), (1, 1, 1), _SIZES)
# A right loop need not know microbatches without response tokens: the exercise has none. Other errors show before.
_FORGIVEN = {"nan-on-empty-mask", "wrong-on-empty-mask", "raises"}
_NOT_EVERY_SPLIT = "One split is right, but not every split."


@remembered
@judged
def check_accumulation_loop(run_minibatch: Callable[..., object]) -> Verdict:
    """Check a loop over the microbatches of one optimizer step.

    Args:
        run_minibatch: called as `run_minibatch(model, microbatches)`; runs forward and backward for each microbatch,
            so that the full-batch mean over response tokens is left in `.grad`. What it returns is not looked at.
            `microbatches` is a list of dicts with `input_ids`, `labels` and `response_mask`.
    """
    run = _run(run_minibatch, _SIZES)
    problem = _state_problem(run) or gradient_problem(run.gradient, example(), run.batch, _SIZES)
    case, largest = smallest(map(_Split, _SMALL), partial(_compare, run_minibatch))
    if problem or case:
        return wrong(*(problem or ("other", _NOT_EVERY_SPLIT)), case, largest)
    return (
        _memory_problem(run.events)
        or _audited(run_minibatch)
        or right(f"{len(_SIZES)} microbatches accumulate to the full batch's mean over tokens.")
    )


def example() -> TinyLM:
    """A fresh model, without the learner's hooks and modes."""
    return TinyLM(d_model=16, num_layers=1, num_heads=2).double()


class _Split(tuple):
    """Sequences in each microbatch."""

    def __str__(self) -> str:
        tokens = ", ".join(str(int(row.sum())) for row in _batch(self)["response_mask"])
        sequences = f"{sum(self)} sequence{'s' if sum(self) > 1 else ''}"
        return f"{sequences} of {tokens} response tokens in microbatches of {', '.join(map(str, self))}"


@dataclass(frozen=True, eq=False)
class _Run:
    """What the loop did: "forward" and "backward" in order, the flat gradient, and whether the model was changed."""

    batch: Batch
    events: list[str]
    gradient: torch.Tensor
    changed: str


def _batch(sizes: Sequence[int]) -> Batch:
    return ragged_minibatch(sum(sizes), imbalance=1.0)


def _run(run_minibatch: Callable, sizes: Sequence[int], quiet: bool = False) -> _Run:
    model, batch, events = example(), _batch(sizes), []
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _record(model, events)
    given = {name: tensor.clone() for name, tensor in batch.items()}
    call(run_minibatch, model, split_minibatch(given, sizes=sizes), quiet=quiet)
    with reading("the model that was given, with the parameters it had"):
        return _Run(batch, events, *_left_in(model, before))


def _left_in(model: TinyLM, before: Sequence[torch.Tensor]) -> tuple[torch.Tensor, str]:
    """The flat gradient, and what was changed: "dtype", "parameters" or ""."""
    after = list(model.parameters())
    if after[0].dtype != before[0].dtype:
        return torch.zeros(()), "dtype"
    moved = any(not torch.equal(*pair) for pair in zip(after, before, strict=True))
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense()).flatten() for p in after]
    return torch.cat(flat), "parameters" if moved else ""


def _record(model: TinyLM, events: list[str]) -> None:
    """Let the list grow as the learner's code runs the model."""

    def after_forward(module: object, inputs: object, logits: torch.Tensor) -> None:
        events.append("forward")
        if logits.requires_grad:
            logits.register_hook(lambda gradient: events.append("backward"))

    model.register_forward_hook(after_forward)


def _state_problem(run: _Run) -> tuple[str, str] | None:
    """Code and hint where there is no gradient to look at, or not of the model that was given."""
    if run.changed == "dtype":
        return "changes-dtype", "The model changed its dtype. Run it in the one it has."
    if run.changed:
        hint = "The parameters changed. Leave optimizer.step() out: it comes after the last microbatch."
        return "changes-parameters", hint
    if run.gradient.any():
        return None
    if not run.events:
        return NOT_STARTED.mistake, NOT_STARTED.message
    if "backward" in run.events:
        return "zeroed-at-the-end", "The gradient is gone. Zero it before the first microbatch, not after the last."
    return "no-backward", "No gradient arrived. Call .backward() on the loss of each microbatch."


def _compare(run_minibatch: Callable, sizes: _Split) -> tuple[str, float | None] | None:
    run = _run(run_minibatch, sizes, quiet=True)
    if not run.events and not run.gradient.any():
        return "", None
    if _state_problem(run):
        return f"{sizes}.", None
    expected = full_batch_gradient(example(), run.batch)
    share = compare(run.gradient, expected).relative_error
    if share <= TOLERANCE:
        return None
    largest = (run.gradient - expected).abs().max().item()
    return f"{sizes}: the gradient is {share:.0%} off the full batch's.", largest


def _memory_problem(events: list[str]) -> Verdict | None:
    """A right gradient that needed the full batch's memory: no forward came after the first backward."""
    first_backward = events.index("backward") if "backward" in events else 0
    if not events or "forward" in events[first_backward:]:
        return None
    hint = (
        "The gradient is right, but the first backward ran after the last forward, so the whole minibatch was in "
        "memory at once. Call .backward() for each microbatch, inside the loop."
    )
    return wrong("all-in-memory", hint)


def _audited(run_minibatch: Callable) -> Verdict | None:
    """What one split does not show: other splits and window lengths, arguments changed, chance."""
    audit = audit_accumulation(run_minibatch, example(), ragged_minibatch(4, imbalance=1.0))
    code = next((code for code in audit.problems if code not in _FORGIVEN), None)
    if code is not None:
        hint = f"{_NOT_EVERY_SPLIT} {LOOP_PROBLEMS[code]}"
        return wrong(code, hint, str(audit.counterexample or audit.details[code]))
    if audit.objective != "token_mean":
        return wrong("other", f"One split is right, but over many the denominator is {audit.formula}.")
    return None
