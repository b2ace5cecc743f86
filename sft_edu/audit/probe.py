"""Call somebody else's step and watch: what reached `.grad`, what came back, what was changed.

Nothing here judges. A call never raises but for KeyboardInterrupt, and leaves the process as it was (see
`global_state.py`); what the step prints goes nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from sft_edu.audit.form import Form, forms
from sft_edu.audit.probe_cases import Case
from sft_edu.audit.returned import read
from sft_edu.audit.words import describe
from sft_edu.global_state import plain_settings


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one call did.

    `gradient` `[B, T]` is `.grad` of the leaf afterwards, None if there is none. `accumulated` has what `.grad` was
    after each time that autograd itself added to it. `loss` is None if no number came back, and `returned` says what
    did. `attached` names the returned tensors that still have a graph, the loss as "loss". `changed` names the
    arguments that the step changed. Where it raised, `error` says what, and all else is empty.
    """

    error: str = ""
    gradient: torch.Tensor | None = None
    accumulated: tuple[torch.Tensor, ...] = ()
    loss: float | None = None
    returned: str = ""
    attached: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass
class Probe:
    """A step, the form of call that it accepts, and how often it was called."""

    step: Callable[..., object]
    form: Form | None = None
    calls: int = field(default=0, init=False)
    refused: str = field(default="", init=False)

    def fit(self, case: Case) -> Outcome:
        """Find the first form in which the step does not raise, and return what it did. The first error if none.

        Where its own parameter for c had to be left out, `refused` says what it raised when c was given.
        """
        errors = []
        for form in forms(self.step):
            outcome = self._call(form, case)
            if not outcome.error:
                self.form = form
                if form.constant is not None and not form.takes("constant"):
                    error = next(error for other, error in errors if other._replace(given=form.given) == form)
                    self.refused = f"Whenever {form.constant.name} is given: {error}"
                return outcome
            errors.append((form, outcome.error))
        return Outcome(error=errors[0][1])

    def __call__(self, case: Case, earlier: torch.Tensor | None = None, from_parameter: bool = False) -> Outcome:
        """One call in the form that fits. `earlier` is in `.grad` before; `from_parameter` makes it no leaf."""
        return self._call(self.form._replace(is_leaf=self.form.is_leaf and not from_parameter), case, earlier)

    def _call(self, form: Form, case: Case, earlier: torch.Tensor | None = None) -> Outcome:
        self.calls += 1
        leaf = case.log_probs.to(form.dtype, copy=True).requires_grad_()
        leaf.grad = None if earlier is None else earlier.to(form.dtype, copy=True)
        accumulated: list[torch.Tensor] = []
        leaf.register_post_accumulate_grad_hook(lambda tensor: accumulated.append(tensor.grad.detach().clone()))
        given = leaf if form.is_leaf else leaf.clone()
        mask = case.mask.to(form.mask_dtype, copy=True)
        with plain_settings():
            try:
                result = form.call(self.step, given, mask, case)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: no step may end the audit
                return Outcome(error=describe(error))
            return Outcome(
                gradient=None if leaf.grad is None else leaf.grad.detach().to_dense().double().clone(),
                accumulated=tuple(gradient.to_dense().double() for gradient in accumulated),
                changed=tuple(_changed(form, case, given, mask)),
                **read(result)._asdict(),
            )


def _changed(form: Form, case: Case, given: torch.Tensor, mask: torch.Tensor) -> Iterator[str]:
    same = given.dtype == form.dtype and torch.equal(given.detach(), case.log_probs.to(form.dtype))
    if not (same and given.requires_grad):
        yield "policy_log_probs"
    is_mask = mask.dtype == form.mask_dtype and not mask.requires_grad
    if not (is_mask and torch.equal(mask, case.mask.to(form.mask_dtype))):
        yield "response_mask"
