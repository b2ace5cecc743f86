"""Check a loss that the learner worked out by hand."""

from __future__ import annotations

from numbers import Real

import torch

from sft_edu.course.progress import remembered
from sft_edu.exercises.verdict import NOT_STARTED, Verdict, close, right, wrong
from sft_edu.step import sft_microbatch_train_step

_LOG_PROBS = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], dtype=torch.float64)
_MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])


@remembered
def check_returned_loss(answer: float, gradient_accumulation_steps: int) -> Verdict:
    """Check a loss worked out by hand: the worked example of the course notes, with another G.

    The verdict holds no difference: added to the answer, it would be the solution.

    Args:
        answer: the loss that `sft_microbatch_train_step` returns, to three digits; `...` if not started.
        gradient_accumulation_steps: G of the question.
    """
    if answer is ...:
        return NOT_STARTED
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, Real):
        return wrong("not-a-number", f"Got {type(answer).__name__}; a number is asked for.")
    steps, by_hand = gradient_accumulation_steps, 5e-4
    with torch.enable_grad():
        loss, metadata = sft_microbatch_train_step(_LOG_PROBS.clone().requires_grad_(), _MASK, steps)
    if close(answer, loss, by_hand):
        return right(f"{-metadata['masked_sum']:.1f} / {steps} / {steps} = {loss:.4f}.")
    found = [
        (code, hint)
        for code, hint, value in _mistakes(loss, steps, metadata["num_tokens"])
        if close(answer, value, by_hand)
    ]
    if found:  # for some G two mistakes lead to one number
        return wrong(found[0][0], " Or: ".join(hint for _, hint in found))
    if abs(answer - loss) < 0.005:
        return wrong("rounded", "Nearly. Give three digits after the point.")
    return wrong("other", "Add the log-probs where the mask is 1, negate, divide by G, divide by G.")


def _mistakes(loss: torch.Tensor, steps: int, tokens: torch.Tensor) -> list[tuple[str, str, torch.Tensor]]:
    """Code, hint and the number that the mistake leads to."""
    return [
        ("wrong-sign", "It is negative. The masked sum is negative; the loss is minus that sum.", -loss),
        ("divided-once", "That is divided by G once. The course notes divide twice.", loss * steps),
        ("not-divided", "That is not divided by G at all.", loss * steps**2),
        ("mask-ignored", "The token with mask 0 is in your sum. Leave it out.", -_LOG_PROBS.sum() / steps**2),
        ("other-steps", "That is the loss for G = 2.", loss * steps**2 / 4),
        ("twice-g", "That is divided by 2G; G divides twice, so by G times G.", loss * steps / 2),
        ("token-mean", "That is a mean over tokens. The course notes take the sum.", loss / tokens),
        (
            "token-mean",
            "That is a mean over tokens. The course notes divide the sum by G twice.",
            loss * steps**2 / tokens,
        ),
    ]
