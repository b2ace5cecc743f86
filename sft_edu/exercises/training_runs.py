"""A model so small that it can be trained in every wrong way, to see which of them the learner's loop is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sft_edu.accumulate import Batch

Minibatches = Sequence[Sequence[Batch]]
LEARNING_RATE = 0.5


class Pairs(nn.Module):
    """Logits that depend on this token and the one before: nonlinear in its weights, and quick."""

    vocab_size = 5

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"here": (self.vocab_size, 4), "before": (self.vocab_size, 4), "logits": (4, self.vocab_size)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` for the token after each of `input_ids` `[B, T]`; also as their own attribute `logits`."""
        earlier = nn.functional.pad(input_ids[:, :-1], (1, 0))
        logits = (self.here[input_ids] + self.before[earlier]).tanh() @ self.logits
        logits.logits = logits  # as models of transformers are read: either form is right
        return logits


def fresh_model() -> Pairs:
    """The same weights every time."""
    return Pairs()


def flat_weights(model: nn.Module) -> torch.Tensor:
    """All weights, detached, in float64 on the CPU."""
    return torch.cat([parameter.detach().to("cpu", torch.float64).flatten() for parameter in model.parameters()])


@dataclass(frozen=True)
class Context:
    """What a divisor may look at: this microbatch, its minibatch, and all of them."""

    batch: Batch
    window: Sequence[Batch]
    minibatches: Minibatches


def tokens(*batches: Batch) -> int:
    """Response tokens."""
    return sum(int(batch["response_mask"].sum()) for batch in batches)


@dataclass(frozen=True)
class Habits:
    """How somebody trains.

    Attributes:
        divisor: of the masked sum of -log p.
        events: `b` and `s` in order, for all minibatches; "" where they are as they should be.
        zero: "step" after each step, "backward" before each backward, "end" at the end of each minibatch, or "never".
        mask: from the response mask to the mask that is used.
        sign: -1 makes the responses less likely.
        clip: "step" clips the norm before each step, "backward" after each backward, "after" after each step.
        max_norm: of the clipping.
    """

    divisor: Callable[[Context], float] = lambda context: tokens(*context.window)
    events: str = ""
    zero: str = "step"
    mask: Callable[[torch.Tensor], torch.Tensor] = lambda mask: mask
    sign: int = 1
    clip: str = ""
    max_norm: float = 1.0


RIGHT = Habits()


def expected_events(minibatches: Minibatches) -> str:
    """`bbsbbsbs`: a backward for each microbatch, a step for each minibatch."""
    return "".join("b" * len(window) + "s" for window in minibatches)


def train_as(habits: Habits, minibatches: Minibatches) -> torch.Tensor:
    """The weights after one epoch of somebody's habits."""
    model, flat = fresh_model(), [(batch, window) for window in minibatches for batch in window]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    position = 0
    for event in habits.events or expected_events(minibatches):
        if event == "s":
            _step(model, optimizer, habits)
        elif position < len(flat):
            batch, window = flat[position]
            _backward(model, Context(batch, window, minibatches), habits)
            position += 1
            if habits.zero == "end" and batch is window[-1]:
                model.zero_grad()
    return flat_weights(model)


def _backward(model: Pairs, context: Context, habits: Habits) -> None:
    if habits.zero == "backward":
        model.zero_grad()
    log_probs = model(context.batch["input_ids"]).log_softmax(-1)
    picked = log_probs.gather(-1, context.batch["labels"].unsqueeze(-1)).squeeze(-1)
    mask = habits.mask(context.batch["response_mask"])
    (-habits.sign * picked[mask].sum() / habits.divisor(context)).backward()
    if habits.clip == "backward":
        nn.utils.clip_grad_norm_(model.parameters(), habits.max_norm)


def _step(model: Pairs, optimizer: torch.optim.Optimizer, habits: Habits) -> None:
    if habits.clip == "step":
        nn.utils.clip_grad_norm_(model.parameters(), habits.max_norm)
    optimizer.step()
    if habits.zero == "step":
        optimizer.zero_grad()
