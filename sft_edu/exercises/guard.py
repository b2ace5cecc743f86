"""Run a learner's code: whatever it does, the check gives a verdict and the process stays as it was."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import torch

from sft_edu.audit.words import describe
from sft_edu.exercises.verdict import NOT_STARTED, Verdict, wrong
from sft_edu.global_state import plain_settings, random_state_kept

Case = TypeVar("Case")

# Part of what autograd says, and the mistake and hint that belong to it.
_ERRORS = {
    "does not require grad": (
        "no-graph",
        "There is no graph here. sft_microbatch_train_step runs backward itself and returns its loss detached. In a "
        "loss of your own, look for no_grad, detach or item.",
    ),
    "a second time": ("second-backward", "Backward ran twice through one graph. Run one backward for each forward."),
    "can be implicitly created only for scalar": ("not-a-scalar", "Backward starts at one number. Sum first."),
}


class Judged(Exception):
    """Ends a check with a verdict, from wherever it is clear."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict


def judged(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """A check whose first argument is a function of the learner's, and which raises nothing but KeyboardInterrupt."""

    @functools.wraps(check)
    def run(answer: Any, *arguments: Any, **keywords: Any) -> Verdict:
        if answer is ...:
            return NOT_STARTED
        if not callable(answer):
            return wrong("not-a-function", f"Got {type(answer).__name__}; a function is asked for.")
        try:
            with _as_before():
                return check(answer, *arguments, **keywords)
        except Judged as end:
            return end.verdict

    return run


def call(function: Callable, *arguments: Any, quiet: bool = False, **keywords: Any) -> Any:
    """What the learner's function returns. Ends the check if it raises or is not started.

    What it prints is shown, or hidden where `quiet`: the first call is enough to look at.
    """
    try:
        with plain_settings() if quiet else _as_before():
            result = function(*arguments, **keywords)
    except (KeyboardInterrupt, Judged):
        raise
    except BaseException as error:  # SystemExit too: whatever it raises is something to tell the learner
        text = describe(error)
        code, hint = next((found for part, found in _ERRORS.items() if part in text), ("raises", ""))
        raise Judged(wrong(code, f"Your function raised {text}{'' if not hint else f'. {hint}'}")) from None
    if result is ...:
        raise Judged(NOT_STARTED)
    return result


@contextmanager
def reading(expected: str) -> Iterator[None]:
    """Read what a learner's function returned: it may be of any class, and raise when looked at."""
    try:
        yield
    except (KeyboardInterrupt, Judged):
        raise
    except BaseException:
        raise Judged(wrong("unreadable", f"What came back cannot be read; expected {expected}.")) from None


def as_floats(value: object, expected: str) -> torch.Tensor:
    """A returned tensor in float64 on the CPU, without graph. Ends the check if it is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise Judged(wrong("not-a-tensor", f"Got {type(value).__name__}; expected {expected}."))
    with reading(expected):
        return value.detach().to_dense().to("cpu", torch.float64).clone()


def smallest(
    cases: Iterable[Case], judge: Callable[[Case], tuple[str, float | None] | None]
) -> tuple[str, float | None]:
    """The first case that the answer gets wrong, in words, and its largest difference; cases ascend in size.

    Args:
        cases: each prints as words.
        judge: returns None where the answer is right; ends the check where it raises, as `call` does.
    """
    for case in cases:
        try:
            found = judge(case)
        except Judged as end:
            return f"{case}: {end.verdict.message}", None
        if found is not None:
            return found
    return "", None


@contextmanager
def _as_before() -> Iterator[None]:
    """PyTorch's plain settings inside and the caller's afterwards, but what is printed is shown."""
    out, err = sys.stdout, sys.stderr
    with random_state_kept(), plain_settings(), redirect_stdout(out), redirect_stderr(err):
        yield
