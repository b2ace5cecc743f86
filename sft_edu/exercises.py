"""Checks for the learner's own answers: a verdict, and a hint where the mistake is a known one.

Every check compares with a result computed on the spot; none holds an answer. A cell that still contains `...` gets
the verdict "not started", so that an unsolved lesson runs from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch

from sft_edu import closed_form
from sft_edu.masks import PRESETS
from sft_edu.step import sft_microbatch_train_step
from sft_edu.tokens import ByteTokenizer, tokenize_prompt_and_output


@dataclass(frozen=True)
class Verdict:
    """Whether the answer is right, and what to do next."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'Correct' if self.passed else 'Not yet'}. {self.message}"


_NOT_STARTED = Verdict(False, "Replace the ... with your answer and run the cell again.")
_EXAMPLE_LOG_PROBS = torch.tensor([[-0.5, -0.3, -0.8, -0.2], [-0.4, -0.6, -0.3, -0.5]], dtype=torch.float64)
_EXAMPLE_MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])


def check_returned_loss(answer: float, gradient_accumulation_steps: int) -> Verdict:
    """Check a loss worked out by hand: the worked example of the course notes, with another G.

    Args:
        answer: the loss that `sft_microbatch_train_step` returns, to three digits; `...` if not started.
        gradient_accumulation_steps: G of the question.
    """
    if answer is ...:
        return _NOT_STARTED
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, Real):
        return Verdict(False, f"Got {type(answer).__name__}; a number is asked for.")
    steps, by_hand = gradient_accumulation_steps, 5e-4
    loss, metadata = sft_microbatch_train_step(_EXAMPLE_LOG_PROBS.clone().requires_grad_(), _EXAMPLE_MASK, steps)
    if _close(answer, loss, by_hand):
        return Verdict(True, f"{-metadata['masked_sum']:.1f} / {steps} / {steps} = {loss:.4f}.")
    everything = -_EXAMPLE_LOG_PROBS.sum()
    mistakes = {
        "It is negative. The masked sum is negative; the loss is minus that sum.": -loss,
        "That is divided by G once. The course notes divide twice.": loss * steps,
        "That is not divided by G at all.": loss * steps**2,
        "The token with mask 0 is in your sum. Leave it out.": everything / steps**2,
        "That is the loss for G = 2.": loss * steps**2 / 4,
        "That is divided by 2G; G divides twice, so by G times G.": loss * steps / 2,
        "That is a mean over tokens. The course notes take the sum.": loss / metadata["num_tokens"],
    }
    hints = [hint for hint, value in mistakes.items() if _close(answer, value, by_hand)]
    if abs(answer - loss) < 0.005:
        return Verdict(False, "Nearly. Give three digits after the point.")
    return Verdict(False, (hints or ["Add the log-probs where the mask is 1, negate, divide by G, divide by G."])[0])


def check_response_mask(make_mask: Callable[[int, int, int], list[int]]) -> Verdict:
    """Check a function that builds one row of the response mask.

    Args:
        make_mask: called with `prompt_length`, `output_length` and `longest`, the length of the longest joined
            sequence; returns `longest - 1` zeros and ones, one for each label.
    """
    lengths = [(3, 2), (1, 4), (5, 3), (2, 1)]
    longest = max(prompt + output for prompt, output in lengths)
    texts = [["p" * prompt for prompt, _ in lengths], ["o" * output for _, output in lengths]]
    expected = tokenize_prompt_and_output(*texts, ByteTokenizer())["response_mask"]
    rows, name = [], getattr(make_mask, "__name__", "your function")
    for prompt_length, output_length in lengths:
        row = _call(make_mask, prompt_length, output_length, longest)
        if isinstance(row, Verdict):
            return row
        try:
            row = [float(value) for value in row]
        except (TypeError, ValueError):
            return Verdict(False, f"Got {type(row).__name__}; expected a list of zeros and ones.")
        if not set(row) <= {0, 1}:
            return Verdict(False, f"Got {min(set(row) - {0, 1}):g} among the values; expected zeros and ones.")
        if len(row) != longest - 1:
            given = f"{name}({prompt_length}, {output_length}, {longest}) gave {len(row)} values"
            hint = " There is no label for the first token, so labels are one fewer than tokens."
            return Verdict(False, f"{given}; expected {longest - 1}.{hint if len(row) == longest else ''}")
        rows.append(row)
    if rows == expected.int().tolist():
        return Verdict(True, f"All {len(lengths)} rows match tokenize_prompt_and_output.")
    for preset in PRESETS.values():
        if rows == preset.make(expected).int().tolist():
            return Verdict(False, f"This is the mask {preset.name!r}. {preset.consequence}")
    wrong = next(i for i, row in enumerate(rows) if row != expected[i].int().tolist())
    given = ", ".join(f"{value:g}" for value in rows[wrong])
    right = ", ".join(str(int(value)) for value in expected[wrong])
    return Verdict(
        False,
        f"{name}({lengths[wrong][0]}, {lengths[wrong][1]}, {longest}) gave [{given}]; expected [{right}]. Label t is "
        "token t + 1: ask of token t + 1 whether it is response. eos is already counted in output_length.",
    )


def check_microbatch_step(step: Callable[..., torch.Tensor]) -> Verdict:
    """Check a microbatch step written by the learner.

    Args:
        step: called as `step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant)`;
            runs backward and returns the detached loss, by the rule of the course notes.
    """
    # B, T, G, n and c: no two of the denominators below coincide, so a wrong one cannot hide behind a right one.
    steps, constant = 5, 1.73
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    log_probs = (-torch.rand(mask.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    denominator = closed_form.denominator("notes", mask, steps, constant)
    expected_loss = closed_form.loss(log_probs, mask, denominator)
    expected = closed_form.grad_log_probs(mask, denominator, torch.float64)
    loss = _call(step, log_probs, mask.clone(), steps, constant)
    if isinstance(loss, Verdict):
        return loss
    problem = _gradient_problem(log_probs.grad, expected, mask, steps, constant) or _loss_problem(loss, expected_loss)
    if problem:
        return Verdict(False, problem)
    return Verdict(True, f"Loss {expected_loss:.4f} and all {expected.numel()} gradients match the formula by hand.")


def _gradient_problem(gradient, expected: torch.Tensor, mask: torch.Tensor, steps: int, constant: float) -> str:
    """The hint for a wrong gradient, empty for a right one."""
    if gradient is None:
        return "No gradient arrived. Call .backward() on the scaled loss."
    if _close(gradient, expected):
        return ""
    if gradient[mask == 0].abs().max() > 0:
        return (
            "Tokens with mask 0 have a gradient. Use the mask before you sum: an integer mask as an index picks whole "
            "rows, so compare it with == 1."
        )
    selected = gradient[mask == 1]
    if not _close(selected, selected[0].expand_as(selected)):
        return "The gradient differs from token to token. Every token under the mask has the same weight in the sum."
    measured = (-1 / selected[0]).item()
    for division, by_counts in _denominators(mask, steps).items():
        for constants, by_constant in _CONSTANTS.items():
            for sign, factor in {"": 1, "Negate the masked sum: this step makes the response less likely.": -1}.items():
                if _close(measured, factor * by_counts * constant**by_constant):
                    return " ".join(filter(None, (sign, division, constants)))
    return "The gradient should be -1 / (c·G·G) where the mask is 1, and 0 elsewhere."


_CONSTANTS = {
    "": 1,
    "The normalize_constant is missing: divide the masked sum by it.": 0,
    "The normalize_constant divides twice.": 2,
    "The normalize_constant multiplies; it should divide.": -1,
}


def _denominators(mask: torch.Tensor, steps: int) -> dict[str, float]:
    """What people divide by besides c, with the hint for it. The right one needs no hint."""
    sequences, tokens = len(mask), int(mask.sum())
    return {
        "": steps**2,
        "It is divided by G once. The course notes divide by G twice.": steps,
        "It is not divided by G. The course notes divide by G twice.": 1,
        "It is divided by G once too often.": steps**3,
        "It is divided by G as often as there are microbatches: once per step in a loop. Twice is enough.": steps
        ** steps,
        "It is divided by G + 2. The second division is by G too.": steps + 2,
        "It is divided by 2·G. The second division is by G too.": 2 * steps,
        "The gradient doubled: call .backward() once.": steps**2 / 2,
        "It is divided by B and by G: that is the rule sequence_mean, not the one of the notes.": sequences * steps,
        "It is divided by the batch size too; the course notes do not.": sequences * steps**2,
        "It is divided by the token count and by G: that is the rule microbatch_token_mean.": tokens * steps,
        "It is divided by the token count too; the course notes take the sum.": tokens * steps**2,
        "It is divided by the token count alone; the course notes take the sum, and divide by G twice.": tokens,
        "It is a mean over all positions; the course notes take the sum.": mask.numel() * steps**2,
        "It is a mean over all positions, divided by G once; the course notes take the sum.": mask.numel() * steps,
    }


def _loss_problem(loss, expected: torch.Tensor) -> str:
    if not isinstance(loss, torch.Tensor):
        return f"The gradient is right. Return the loss as a 0-dim tensor; got {type(loss).__name__}."
    if loss.ndim:
        return f"The gradient is right. Return the loss as a 0-dim tensor; got shape {list(loss.shape)}."
    if not _close(loss, expected):
        return f"The gradient is right, but the loss is {loss:.4f}; what was differentiated is {expected:.4f}."
    if loss.requires_grad:
        return "Numbers are right. Return loss.detach(): the returned loss still holds its graph."
    return ""


def _call(function: Callable, *arguments) -> object:
    """What the learner's function returns, or a verdict if it is not started or fails."""
    try:
        result = function(*arguments)
    except Exception as error:  # whatever the learner's code raises is something to tell the learner
        return Verdict(False, f"Your function raised {type(error).__name__}: {error}")
    return _NOT_STARTED if result is ... else result


def _close(one, other, tolerance: float = 1e-5) -> bool:
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    return torch.allclose(one, other, rtol=tolerance, atol=1e-9)
