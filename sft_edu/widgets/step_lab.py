"""The six steps, with a hand on the mask, G, the constant, the rule and every log-prob."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import ipywidgets
import torch
import traitlets

from sft_edu.digits import compact, fixed
from sft_edu.scaling import RULES
from sft_edu.widgets import state
from sft_edu.widgets.lab import between, labelled, one_of
from sft_edu.widgets.microbatch_lab import MicrobatchLab
from sft_edu.widgets.step_ahead import ahead_of
from sft_edu.widgets.step_view import token_gradient
from sft_edu.widgets.token_slider import TokenSlider

_LOG_PROBS = ((-0.5, -0.3, -0.8, -0.2), (-0.4, -0.6, -0.3, -0.5))
_MASK = ((1, 1, 0, 1), (1, 1, 1, 1))


class StepLab(MicrobatchLab):
    """One microbatch through the six steps. Without arguments: the worked example of the course notes.

    Drive it by hand or from code: `lab.gradient_accumulation_steps = 4; lab`. The token in focus is the one whose
    log-prob the slider changes, and whose gradient is taken apart as a product. Rule `token_mean` takes every
    microbatch of the minibatch to hold as many response tokens as this one.

    Args:
        policy_log_probs: `[B, T]`, finite, at most 0.
        response_mask: `[B, T]`, 0 and 1.
        tokens: B rows of T short texts, or None: the tokens show their log-probs.
        gradient_accumulation_steps: G, 1 to 32.
        normalize_constant: c, 0.1 to 100.
        rule: one of `RULES`.
    """

    SETTINGS: ClassVar = {
        "G": ("gradient_accumulation_steps", state.INTEGER),
        "c": ("normalize_constant", state.NUMBER),
        "rule": ("rule", state.NAME),
        "mask": ("mask", state.MASK),
        "logp": ("log_probs", state.MATRIX),
    }

    def __init__(
        self,
        policy_log_probs: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        tokens: Sequence[Sequence[str]] | None = None,
        *,
        gradient_accumulation_steps: int = 2,
        normalize_constant: float = 1.0,
        rule: str = "notes",
    ) -> None:
        super().__init__(
            torch.tensor(_LOG_PROBS) if policy_log_probs is None else policy_log_probs,
            torch.tensor(_MASK) if response_mask is None else response_mask,
            tokens,
            gradient_accumulation_steps=gradient_accumulation_steps,
            normalize_constant=normalize_constant,
            rule=rule,
        )

    @traitlets.validate("rule")
    def _check_rule(self, proposal) -> str:
        return one_of("rule", proposal["value"], RULES)

    @traitlets.validate("normalize_constant")
    def _check_constant(self, proposal) -> float:
        return between("normalize_constant", proposal["value"], 0.1, 100)

    @property
    def focused_log_prob(self) -> float:
        """The log-prob of the token in focus; set it, and the step runs again."""
        row, column = self._token_mask.focused
        return self.log_probs[row][column]

    @focused_log_prob.setter
    def focused_log_prob(self, value: float) -> None:
        row, column = self._token_mask.focused
        changed = [list(values) for values in self.log_probs]
        changed[row][column] = value
        self.log_probs = changed

    def _make(self) -> list[ipywidgets.Widget]:
        views = super()._make()
        steps = ipywidgets.IntSlider(min=1, max=32, **labelled("G", "gradient_accumulation_steps", "260px"))
        constant = ipywidgets.FloatText(step=0.5, **labelled("c", "normalize_constant", "90px"))
        rule = ipywidgets.Dropdown(options=list(RULES), **labelled("rule", "the denominator", "200px"))
        log_prob = TokenSlider(
            min=-10, max=0, step=0.1, **labelled("log p", "the log-prob of the token in focus", "190px")
        )
        self._control("gradient_accumulation_steps", steps)
        self._control("normalize_constant", constant)
        self._control("rule", rule)
        self._control("focused_log_prob", log_prob)
        self._chain.ahead = ahead_of(
            steps=steps, constant=constant, rule=rule, mask=self._token_mask, log_prob=log_prob
        )
        return views

    def _inputs(self) -> dict[str, object]:
        return {
            "steps": self.gradient_accumulation_steps,
            "constant": self.normalize_constant,
            "rule": self.rule,
            "mask": self.mask,
            "log_probs": self.log_probs,
        }

    def _show(self) -> None:
        super()._show()
        self._turn_slider()

    def _explain(self, change) -> None:
        super()._explain(change)
        with self._lock:
            before, self._writing = self._writing, True  # the slider turns to another token: nobody moved it
            try:
                self._turn_slider()
            finally:
                self._writing = before

    def _turn_slider(self) -> None:
        self._controls["focused_log_prob"].turn(self._token_mask.focused, self.focused_log_prob)

    def _written(self) -> dict[str, tuple[str, state.Kind]]:
        unchanged = self.log_probs == self._first_log_probs
        return {key: setting for key, setting in self.SETTINGS.items() if key != "logp" or not unchanged}

    def words(self) -> str:
        rule, counts = self._trace["scaling"]
        if not self.num_tokens:
            return "The mask is 0 everywhere: loss and gradient are exactly 0."
        words = (
            f"Each of the {self.num_tokens} response tokens gets the gradient {fixed(token_gradient(self._trace))} = "
            f"-1 / {rule.after_slash}, where {rule.formula} = {compact(float(rule.denominator(counts)))}."
        )
        return words if self.num_tokens == self.gradient.numel() else f"{words} Every other token gets exactly 0."
