"""A recorded step as a picture with words."""

from __future__ import annotations

from collections.abc import Sequence

from sft_edu.digits import compact, fixed
from sft_edu.masks import token_roles
from sft_edu.plots import StepPicture
from sft_edu.trace import Row, Trace
from sft_edu.widgets.figure import FigureView


def show_step(trace: Trace, tokens: Sequence[Sequence[str]] | None = None) -> FigureView:
    """The six steps, the log-probs and the gradient of a recorded step.

    Args:
        trace: of one step, `[B, T]` small enough to read: up to about 24 tokens.
        tokens: B rows of T short texts to show in the cells, or None.
    """
    picture, view = StepPicture(token_roles(trace["response_mask"] != 0), tokens), FigureView()
    draw(picture, trace)
    view.show(picture.figure, describe(trace))
    return view


def draw(picture: StepPicture, trace: Trace) -> None:
    """Put the numbers of a step into a picture of the same shape."""
    steps = {row.name: (row.formula, value_text(trace, row)) for row in trace.rows() if row.step != "in"}
    log_probs, mask, gradient = trace["policy_log_probs"], trace["response_mask"], trace.grad("policy_log_probs")
    picture.update(steps, log_probs.tolist(), mask.tolist(), gradient.tolist())


def stages(trace: Trace) -> list[dict[str, str]]:
    """The six steps as a `StageChain` takes them."""
    return [
        {"step": row.step, "name": row.name, "symbolic": symbolic, "numeric": numeric, "value": value_text(trace, row)}
        for row in trace.rows()
        if row.step != "in"
        for symbolic, _, numeric in [row.formula.partition(" = ")]
    ]


def value_text(trace: Trace, row: Row) -> str:
    """The value of a step in a few characters."""
    if row.name == "backward":
        return f"{fixed(token_gradient(trace))} or 0"
    return compact(row.value.item()) if row.name == "num_tokens" else fixed(row.value.item())


def describe(trace: Trace) -> str:
    """The numbers of a step in one sentence."""
    return (
        f"num_tokens {int(trace['num_tokens'])}, masked_sum {fixed(trace['masked_sum'].item())}, "
        f"loss {fixed(trace['loss'].item())}, scaled_loss {fixed(trace['scaled_loss'].item())}, "
        f"gradient {fixed(token_gradient(trace))} where the mask is 1."
    )


def token_gradient(trace: Trace) -> float:
    """The gradient that every response token gets; 0 if there is none."""
    return float(trace.grad("policy_log_probs").min())
