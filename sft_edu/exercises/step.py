"""Check a learner's microbatch step: one telling call, and then the audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from sft_edu import checks, closed_form
from sft_edu.audit import audit_step
from sft_edu.audit.report import PROBLEMS
from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import as_floats, call, judged, reading, smallest
from sft_edu.exercises.step_mistakes import gradient_problem
from sft_edu.exercises.verdict import Verdict, close, difference, numbers, right, wrong

_TOKENS = 41  # N; more than any microbatch here has


@dataclass(frozen=True)
class _Case:
    """One call."""

    log_probs: torch.Tensor
    mask: torch.Tensor
    steps: int = 1
    constant: float = 1.0

    def denominator(self, rule: str) -> float:
        return closed_form.denominator(rule, self.mask, self.steps, self.constant, _TOKENS)

    def loss(self, rule: str) -> torch.Tensor:
        return closed_form.loss(self.log_probs, self.mask, self.denominator(rule))

    def gradient(self, rule: str) -> torch.Tensor:
        return closed_form.grad_log_probs(self.mask, self.denominator(rule), torch.float64)

    def __str__(self) -> str:
        inputs = f"log-probs {numbers(self.log_probs)}, mask {numbers(self.mask)}"
        if self.mask.numel() > 4:
            inputs = f"B = {self.mask.shape[0]}, T = {self.mask.shape[1]}"
        return f"{inputs}, G = {self.steps}, c = {numbers(self.constant)}"


def _telling() -> _Case:
    # B, T, G, n and c: no two of the known wrong denominators coincide, so one cannot hide behind a right one.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    return _Case(-torch.rand(mask.shape, generator=generator, dtype=torch.float64), mask, 5, 1.73)


def _cases() -> list[_Case]:
    """Ascending in size; the first one that fails is the one to show."""

    def case(log_probs: list, mask: list, steps: int = 1, constant: float = 1.0) -> _Case:
        return _Case(torch.tensor(log_probs, dtype=torch.float64), torch.tensor(mask), steps, constant)

    return [
        case([[-1.0]], [[1]]),
        case([[-1.0, -2.0]], [[0, 1]]),
        case([[-1.0, -2.0]], [[1, 1]]),
        case([[-1.0], [-2.0]], [[1], [1]]),
        case([[-1.0]], [[1]], steps=2),
        case([[-1.0]], [[1]], steps=3),
        case([[-1.0]], [[1]], constant=4.0),
        _telling(),
    ]


@remembered
@judged
def check_sft_microbatch_train_step(step: Callable[..., object], rule: str = "notes") -> Verdict:
    """Check a microbatch step written by the learner.

    Args:
        step: called as `step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant)`; runs
            backward and returns the detached loss, alone or as `(loss, metadata)`. Under `token_mean` it is also given
            the keyword `minibatch_tokens`.
        rule: one of `RULES`.
    """
    checks.check_rule(rule)
    case = _telling()
    problem = _problem(step, case, rule, quiet=False)
    if problem is None:
        return _audited(step, rule) or right(
            f"Loss {case.loss(rule):.4f} and all {case.mask.numel()} gradients match the formula by hand."
        )
    return wrong(*_measured(step, *problem), *smallest(_cases(), partial(_compare, step, rule)))


def _run(step: Callable, case: _Case, rule: str, quiet: bool) -> tuple[torch.Tensor | None, object]:
    """What arrived in `.grad`, and what came back."""
    log_probs = case.log_probs.clone().requires_grad_()
    tokens = {"minibatch_tokens": _TOKENS} if rule == "token_mean" else {}
    returned = call(step, log_probs, case.mask.clone(), case.steps, case.constant, quiet=quiet, **tokens)
    gradient = log_probs.grad
    return None if gradient is None else as_floats(gradient, "a gradient"), returned


def _problem(step: Callable, case: _Case, rule: str, quiet: bool) -> tuple[str, str] | None:
    """Code and hint; None for a right step."""
    gradient, returned = _run(step, case, rule, quiet)
    problem = gradient_problem(gradient, case.mask, rule, case.denominator(rule), case.steps, case.constant)
    return problem or _loss_problem(returned, case, rule)


def _loss_problem(returned: object, case: _Case, rule: str) -> tuple[str, str] | None:
    with reading("the loss, or the loss and a dict"):
        loss, *rest = returned if isinstance(returned, tuple) and returned else (returned,)
    if not isinstance(loss, torch.Tensor):
        hint = f"The gradient is right. Return the loss as a 0-dim tensor; got {type(loss).__name__}."
        return "loss-not-a-tensor", hint
    if loss.ndim:
        shape = list(loss.shape)
        return "loss-not-a-tensor", f"The gradient is right. Return the loss as a 0-dim tensor; got shape {shape}."
    found, expected = as_floats(loss, "a 0-dim tensor"), case.loss(rule)
    if not close(found, expected):
        hint = f"The gradient is right, but the loss is {found:.4f}; what was differentiated is {expected:.4f}."
        return "value-mismatch", hint
    if loss.requires_grad:
        return "loss-attached", "Numbers are right. Return loss.detach(): the returned loss still holds its graph."
    return _metadata_problem(rest[0], case) if rest and isinstance(rest[0], Mapping) else None


def _metadata_problem(metadata: Mapping, case: _Case) -> tuple[str, str] | None:
    """Metadata need not be there, but what is there has to be true."""
    selected = case.log_probs[case.mask == 1]
    for name, expected in (("num_tokens", float(len(selected))), ("masked_sum", selected.sum() / case.constant)):
        with reading("a dict of tensors"):
            found = float(metadata[name]) if name in metadata else float(expected)
        if not close(found, expected):
            hint = f"Loss and gradient are right, but {name} in the metadata is {found:.4f}; expected {expected:.4f}."
            return "metadata-mismatch", hint
    return None


def _compare(step: Callable, rule: str, case: _Case) -> tuple[str, float | None] | None:
    gradient, returned = _run(step, case, rule, quiet=True)
    expected = case.gradient(rule)
    if gradient is None:
        return f"{case}: no gradient, expected {numbers(expected)}.", None
    if not close(gradient, expected):
        small = case.mask.numel() <= 4
        numbers_too = f": gradient {numbers(gradient)}, expected {numbers(expected)}" if small else ""
        return f"{case}{numbers_too}.", difference(gradient, expected)
    loss, by_hand = returned[0] if isinstance(returned, tuple) and returned else returned, case.loss(rule)
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        return None
    found = as_floats(loss, "a 0-dim tensor")
    if close(found, by_hand):
        return None
    return f"{case}: loss {numbers(found)}, expected {numbers(by_hand)}.", difference(found, by_hand)


def _measured(step: Callable, code: str, hint: str) -> tuple[str, str]:
    """An unknown denominator is worth forty calls more: the audit says how it depends on each count."""
    if code not in ("other", "wrong-denominator"):
        return code, hint
    audit = audit_step(step)
    if "not-deterministic" in audit.problems:
        return "not-deterministic", PROBLEMS["not-deterministic"]
    return code, f"{hint} Over many calls, D = {audit.formula} was measured."


def _audited(step: Callable, rule: str) -> Verdict | None:
    """What one call does not show: other counts, an earlier gradient, empty masks, arguments changed, chance."""
    audit = audit_step(step)
    if audit.problems:
        code = audit.problems[0]
        return wrong(code, f"One call is right, but not every call. {PROBLEMS[code]}", audit.details[code])
    if audit.rule != rule:
        return wrong("other", f"One call is right, but over many the denominator is {audit.formula}.")
    return None
