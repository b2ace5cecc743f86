"""The six steps, with a hand on G, the constant, the rule and the mask."""

from __future__ import annotations

import ipywidgets
import torch
import traitlets

from sft_edu.masks import token_roles
from sft_edu.scaling import RULES
from sft_edu.widgets.lab import Lab, labelled
from sft_edu.widgets.step_view import token_gradient

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
        super().__init__(
            log_probs,
            mask,
            token_roles(mask != 0),
            tokens,
            gradient_accumulation_steps=gradient_accumulation_steps,
            normalize_constant=normalize_constant,
            rule=rule,
        )

    @traitlets.validate("rule")
    def _check_rule(self, proposal) -> str:
        if proposal["value"] not in RULES:
            raise traitlets.TraitError(f"rule: got {proposal['value']!r}; expected one of {', '.join(RULES)}")
        return proposal["value"]

    def _add_controls(self) -> None:
        self._control(
            "gradient_accumulation_steps",
            ipywidgets.IntSlider(min=1, max=32, **labelled("G", "gradient_accumulation_steps", "300px")),
        )
        self._control(
            "normalize_constant",
            ipywidgets.BoundedFloatText(min=0.1, max=100, step=0.5, **labelled("c", "normalize_constant", "100px")),
        )
        self._control("rule", ipywidgets.Dropdown(options=list(RULES), **labelled("rule", "the denominator", "220px")))

    def _settings(self) -> str:
        return f"G={self.gradient_accumulation_steps}, c={self.normalize_constant:g}, rule={self.rule!r}"

    def _sentence(self) -> str:
        rule, counts = self._trace["scaling"]
        if not self.num_tokens:
            return "The mask is 0 everywhere: loss and gradient are exactly 0."
        return (
            f"Each of the {self.num_tokens} response tokens gets the gradient {token_gradient(self._trace):.4f} = "
            f"-1 / ({rule.formula}), where {rule.formula} = {float(rule.denominator(counts)):g}. "
            "Every other token gets exactly 0."
        )
