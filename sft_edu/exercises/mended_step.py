"""Check a step that a learner has mended: the audit is the judge."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sft_edu.audit import audit_step
from sft_edu.course.progress import remembered
from sft_edu.exercises.guard import call, judged
from sft_edu.exercises.verdict import Verdict, right, wrong


@remembered
@judged
def check_mended_step(step: Callable[..., object]) -> Verdict:
    """Check that a step is a mean over the response tokens of the whole minibatch, and that the audit finds no fault.

    Args:
        step: called as `step(log_probs, mask, steps, minibatch_tokens=N)`; returns the loss and a dict, neither with
            a graph. `log_probs` and `mask` are `[B, T]`.
    """
    log_probs = torch.full((2, 4), -1.0, dtype=torch.float64, requires_grad=True)
    call(step, log_probs, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool), 2, minibatch_tokens=11)
    audit = audit_step(step)
    if audit.problems:
        code, *others = audit.problems
        more = f" It also says: {', '.join(others)}." if others else ""
        return wrong(code, f"The audit says {code}: {audit.details[code]}{more}")
    if audit.rule != "token_mean":
        return wrong("wrong-rule", f"No problems, but D = {audit.formula}. The mean over all response tokens has N.")
    return right("token_mean, D = N, and the audit finds no problem.")
