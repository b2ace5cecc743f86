"""A recorded step as a picture with words."""

from __future__ import annotations

from collections.abc import Sequence

from sft_edu.digits import fixed
from sft_edu.masks import token_roles
from sft_edu.plots import StepPicture
from sft_edu.trace import Trace
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
    rows = {row.name: row for row in trace.rows() if row.step != "in"}
    steps = {name: (row.formula, fixed(float(row.value))) for name, row in rows.items() if name in _FLOATS}
    steps["num_tokens"] = (rows["num_tokens"].formula, str(int(trace["num_tokens"])))
    steps["backward"] = (rows["backward"].formula, f"{fixed(token_gradient(trace))} or 0")
    log_probs, mask, gradient = trace["policy_log_probs"], trace["response_mask"], trace.grad("policy_log_probs")
    picture.update(steps, log_probs.tolist(), mask.tolist(), gradient.tolist())


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


_FLOATS = ("masked_sum", "loss", "scaled_loss", "returned_loss")
