"""The six steps, with a hand on G, the constant, the rule and the mask."""

from __future__ import annotations

import ipywidgets
import torch
import traitlets

from sft_edu.scaling import RULES
from sft_edu.widgets.lab import Lab

_LOG_PROBS = ((-0.5, -0.3, -0.8, -0.2), (-0.4, -0.6, -0.3, -0.5))
_MASK = ((1, 1, 0, 1), (1, 1, 1, 1))


class StepLab(Lab):
    """One microbatch through the six steps. Without arguments: the worked example of the course notes.

    Drive it by hand or from code: `lab.gradient_accumulation_steps = 4; lab`. Rule `token_mean` takes every microbatch
    of the minibatch to hold as many response tokens as this one.

    Args:
        policy_log_probs: `[B, T]`, finite.
        response_mask: `[B, T]`, 0 and 1.
        tokens: B rows of T short texts to show in the cells, or None.
        gradient_accumulation_steps: G, 1 to 32.
        normalize_constant: c, 0.1 to 100.
        rule: one of `RULES`.
    """

    def __init__(
        self,
        policy_log_probs: torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        tokens: list[list[str]] | None = None,
        *,
        gradient_accumulation_steps: int = 2,
        normalize_constant: float = 1.0,
        rule: str = "notes",
    ) -> None:
        log_probs = torch.tensor(_LOG_PROBS) if policy_log_probs is None else policy_log_probs
        mask = torch.tensor(_MASK) if response_mask is None else response_mask
        mask = tuple(tuple(int(value) for value in row) for row in mask.tolist())
        self._start = {
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "normalize_constant": normalize_constant,
            "rule": rule,
        }
        roles = [["response" if value else "prompt" for value in row] for row in mask]
        super().__init__(log_probs, mask, roles, tokens)
        self.reset()

    def reset(self) -> None:
        with self.hold_trait_notifications():
            self.set_trait("mask", self._first_mask)
            for name, value in self._start.items():
                self.set_trait(name, value)

    @traitlets.validate("rule")
    def _check_rule(self, proposal) -> str:
        if proposal["value"] not in RULES:
            raise traitlets.TraitError(f"rule: got {proposal['value']!r}; expected one of {', '.join(RULES)}")
        return proposal["value"]

    def _controls(self) -> list[ipywidgets.Widget]:
        steps = ipywidgets.IntSlider(
            min=1, max=32, description="G", tooltip="gradient_accumulation_steps", continuous_update=True
        )
        constant = ipywidgets.BoundedFloatText(
            min=0.1, max=100, step=0.5, description="c", tooltip="normalize_constant", layout={"width": "170px"}
        )
        rule = ipywidgets.Dropdown(options=list(RULES), description="rule", layout={"width": "280px"})
        for control, name in (
            (steps, "gradient_accumulation_steps"),
            (constant, "normalize_constant"),
            (rule, "rule"),
        ):
            traitlets.link((self, name), (control, "value"))
        return [steps, constant, rule]

    def _settings(self) -> str:
        return f"G={self.gradient_accumulation_steps}, c={self.normalize_constant:g}, rule={self.rule!r}"

    def _sentence(self) -> str:
        rule, counts = self._trace["scaling"]
        if not self.num_tokens:
            return "The mask is 0 everywhere: loss and gradient are exactly 0."
        return (
            f"Each of the {self.num_tokens} response tokens gets the gradient {self.token_gradient:.4f} = "
            f"-1 / ({rule.formula}), where {rule.formula} = {float(rule.denominator(counts)):g}. "
            "Every other token gets exactly 0."
        )
