"""Checks for the learner's own accumulation: a loop over microbatches, and the denominators of the rules.

As in `exercises.py`, every check compares with a result computed on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sft_edu.accumulate import compare, full_batch_gradient, split_minibatch
from sft_edu.exercises import _NOT_STARTED, Verdict, _call, _close
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch
from sft_edu.scaling import RULES

_SIZES = (3, 1, 2)  # no two microbatches agree in sequences or in response tokens


def check_accumulation_loop(run_minibatch: Callable[..., object]) -> Verdict:
    """Check a loop over the microbatches of one optimizer step.

    Args:
        run_minibatch: called as `run_minibatch(model, microbatches)`; runs forward and backward for each microbatch,
            so that the full-batch mean over response tokens is left in `.grad`. What it returns is not looked at.
            `microbatches` is a list of dicts with `input_ids`, `labels` and `response_mask`.
    """
    model, batch = _example()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    events = _record(model)
    result = _call(run_minibatch, model, split_minibatch(batch, sizes=_SIZES))
    if isinstance(result, Verdict):
        return result
    if next(model.parameters()).dtype != before[0].dtype:
        return Verdict(False, "The model changed its dtype. Run it in the one it has.")
    if any(not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)):
        return Verdict(False, "The parameters changed. Leave optimizer.step() out: it comes after the last microbatch.")
    gradients = [parameter.grad for parameter in model.parameters()]
    if all(gradient is None or not gradient.any() for gradient in gradients):
        return _no_gradient(events)
    model, _ = _example()  # without the learner's hooks and modes
    pairs = zip(model.parameters(), gradients, strict=True)
    gradient = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
    problem = _loop_problem(gradient, model, batch) or _memory_problem(events)
    if problem:
        return Verdict(False, problem)
    return Verdict(True, f"{len(_SIZES)} microbatches accumulate to the full batch's mean over tokens.")


def _example() -> tuple[TinyLM, dict[str, torch.Tensor]]:
    model = TinyLM(d_model=16, num_layers=1, num_heads=2).double()
    return model, ragged_minibatch(sum(_SIZES), imbalance=1.0)


def _record(model: TinyLM) -> list[str]:
    """A list that grows by "forward" and "backward" as the learner's code runs them."""
    events: list[str] = []

    def after_forward(module, inputs, logits):
        events.append("forward")
        if logits.requires_grad:
            logits.register_hook(lambda gradient: events.append("backward"))

    model.register_forward_hook(after_forward)
    return events


def _no_gradient(events: list[str]) -> Verdict:
    if not events:
        return _NOT_STARTED
    if "backward" in events:
        return Verdict(False, "The gradient is gone. Zero it before the first microbatch, not after the last.")
    return Verdict(False, "No gradient arrived. Call .backward() on the loss of each microbatch.")


def _loop_problem(gradient: torch.Tensor, model: TinyLM, batch: Mapping[str, torch.Tensor]) -> str:
    """The hint for a wrong gradient, empty for a right one."""
    microbatches = split_minibatch(batch, sizes=_SIZES)
    sums = torch.stack([full_batch_gradient(model, microbatch, objective="sum") for microbatch in microbatches])
    tokens = torch.tensor([[int(microbatch["response_mask"].sum())] for microbatch in microbatches])
    expected = sums.sum(0) / tokens.sum()
    if compare(gradient, expected).relative_error < 1e-9:
        return ""
    unmasked = _unmasked(model, batch)
    mistakes = _wrong_denominators(sums, tokens, torch.tensor(_SIZES).unsqueeze(1)) | {
        "The gradient has the wrong sign: this loop makes the responses less likely.": -expected,
        "The gradient doubled: run one backward for each microbatch.": 2 * expected,
        "Tokens with mask 0 are in your loss. Use the response mask.": unmasked,
        "Tokens with mask 0 are in your sum, though not in your count. Use the response mask in both.": (
            unmasked * batch["response_mask"].numel() / tokens.sum()
        ),
    }
    for hint, value in mistakes.items():
        if compare(gradient, value).relative_error < 1e-9:
            return hint
    return _missing_microbatch(gradient, sums) or _by_direction(gradient, expected)


def _wrong_denominators(sums: torch.Tensor, tokens: torch.Tensor, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of wrong divisors by their hint, from the sums `[G, P]` and two counts `[G, 1]`."""
    steps, total, means = len(sums), sums.sum(0), (sums / tokens).sum(0)
    own_mean = "Each microbatch is divided by its own token count"
    right = "Divide by the response tokens of all microbatches"
    return {
        f"{own_mean}: a mean of means is not the mean. {right}.": means / steps,
        f"{own_mean}, and by G twice. {right}, and by nothing else.": means / steps**2,
        f"{own_mean}. {right}.": means,
        f"The sum is not divided at all. {right}.": total,
        f"The sum is divided by G alone. {right}.": total / steps,
        f"The sum is divided by G twice, as in the course notes. {right}, once.": total / steps**2,
        f"That is a mean over sequences. {right}.": total / sequences.sum(),
        f"Each microbatch is divided by its B, and by G. {right}.": (sums / sequences).sum(0) / steps,
        "The gradient is divided by G as well. The response tokens of all microbatches are the whole denominator.": (
            total / tokens.sum() / steps
        ),
        "The gradient is divided by G twice as well. The response tokens of all microbatches are the whole "
        "denominator.": total / tokens.sum() / steps**2,
    }


def _unmasked(model: TinyLM, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return full_batch_gradient(model, {**batch, "response_mask": torch.ones_like(batch["response_mask"])})


def _missing_microbatch(gradient: torch.Tensor, sums: torch.Tensor) -> str:
    """The hint where some microbatches are not in the gradient, however it is scaled."""
    hints = {
        "Only the last microbatch is left. Zero the gradient before the loop, not inside it.": sums[-1],
        "Only the first microbatch is there. Run every one.": sums[0],
        "The last microbatch is missing. An incomplete window counts too.": sums[:-1].sum(0),
        "The first microbatch is missing. Zero the gradient before it, not after it.": sums[1:].sum(0),
    }
    return next((hint for hint, value in hints.items() if compare(gradient, value).cosine > 1 - 1e-12), "")


def _by_direction(gradient: torch.Tensor, expected: torch.Tensor) -> str:
    found = compare(gradient, expected)
    if found.cosine > 1 - 1e-12:
        return (
            f"The direction is right, but the gradient is {found.ratio:.4g} times as long as the full batch's. The "
            "check has a minibatch of its own: count its microbatches and its response tokens."
        )
    return (
        f"The gradient is {found.relative_error:.0%} off the full batch's. Sum -log p over the response tokens of each "
        "microbatch, and divide by the response tokens of all microbatches."
    )


def _memory_problem(events: list[str]) -> str:
    """The hint for a right gradient that needed the full batch's memory: no forward came after the first backward."""
    first_backward = events.index("backward") if "backward" in events else 0
    if not events or "forward" in events[first_backward:]:
        return ""
    return (
        "The gradient is right, but the first backward ran after the last forward, so the whole minibatch was in "
        "memory at once. Call .backward() for each microbatch, inside the loop."
    )


_SYMBOLS = ("B", "G", "c", "n", "N")
# Two sets of counts in which no product coincides with another: a wrong formula cannot hide.
_COUNTS = ({"B": 3, "G": 5, "c": 1.75, "n": 11, "N": 41}, {"B": 7, "G": 4, "c": 0.6, "n": 13, "N": 97})


def check_denominator(denominator: Callable[..., float] | Mapping[str, Callable[..., float]]) -> Verdict:
    """Check the denominators of all rules: D, so that `scaled_loss = -(masked sum, before dividing by c) / D`.

    Args:
        denominator: a function called as `denominator(rule, B, G, c, n, N)`, or a dict with a function
            `f(B, G, c, n, N)` for each rule. Returns D, a number.
    """
    if denominator is ...:
        return _NOT_STARTED
    for rule in RULES:
        for counts in _COUNTS:
            value = _denominator_of(denominator, rule, counts)
            if isinstance(value, Verdict):
                return value
            problem = _denominator_problem(value, rule, counts)
            if problem:
                return Verdict(False, f"{rule}: {problem}")
    formulas = ", ".join(f"{rule.name} {rule.formula}" for rule in RULES.values())
    return Verdict(True, f"All {len(RULES)} agree: {formulas}.")


def _denominator_of(denominator, rule: str, counts: Mapping[str, float]) -> float | Verdict:
    arguments = [counts[symbol] for symbol in _SYMBOLS]
    if not isinstance(denominator, Mapping):
        value = _call(denominator, rule, *arguments)
    elif rule not in denominator:
        return Verdict(False, f"{rule}: not in your dict.")
    elif denominator[rule] is ...:
        return _NOT_STARTED
    else:
        value = _call(denominator[rule], *arguments)
    if isinstance(value, Verdict):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with several elements
        return Verdict(False, f"{rule}: got {type(value).__name__}; a number is asked for.")


def _denominator_problem(value: float, rule: str, counts: Mapping[str, float]) -> str:
    """The hint for a wrong denominator, empty for a right one."""
    expected = _expected_denominator(rule, counts)
    if _close(value, expected):
        return ""
    batch, steps, constant, own, total = (counts[symbol] for symbol in _SYMBOLS)
    mistakes = {
        "the constant c is missing; this rule divides by it too.": expected / constant,
        "c is in your formula; a mean over tokens does not depend on it.": expected * constant,
        "G is missing once.": expected / steps,
        "G is missing.": expected / steps**2,
        "G is in your formula once too often.": expected * steps,
        "B is missing.": expected / batch,
        "B is in your formula; this rule does not count sequences.": expected * batch,
        "you wrote N, the tokens of all microbatches; this rule counts those of its own, n.": expected * total / own,
        "you wrote n, the tokens of one microbatch; this rule counts those of all, N.": expected * own / total,
        "that is 1/D. D is what the loss is divided by.": 1 / expected,
        "D is positive; the minus sign belongs to the loss.": -expected,
        "you wrote G + G; the two divisions by G multiply.": constant * 2 * steps,
        "you wrote G**G; G divides twice, so G**2.": constant * steps**steps,
    }
    mistakes |= {f"that is the denominator of {name}.": _expected_denominator(name, counts) for name in RULES}
    hints = [hint for hint, wrong in mistakes.items() if _close(value, wrong)]
    return (hints or [f"not yet. Accumulated, it has to be {RULES[rule].accumulates_to}."])[0]


def _expected_denominator(rule: str, counts: Mapping[str, float]) -> float:
    return RULES[rule].denominator({"1": 1} | counts)
