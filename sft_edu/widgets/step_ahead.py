"""What the page needs to draw the six steps ahead of the kernel: the rules, and where the inputs are."""

from __future__ import annotations

import ipywidgets

from sft_edu.scaling import RULES


def ahead_of(**controls: ipywidgets.Widget) -> dict:
    """For `StageChain.ahead`.

    Args:
        controls: the widgets on which a hand changes steps, constant, rule, mask and log_prob.
    """
    rules = {
        rule.name: {
            "first": rule.first,
            "second": rule.second,
            "uses_constant": rule.uses_constant,
            "formula": rule.formula,
        }
        for rule in RULES.values()
    }
    return {"controls": controls, "rules": rules}
