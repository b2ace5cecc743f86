"""How to train: the settings of a run, and the optimizer and the learning rates that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from sft_edu import checks

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        rule: one of `RULES`.
        microbatch_size: sequences in one forward and backward: what has to fit into memory.
        gradient_accumulation_steps: G, microbatches in one optimizer step.
        normalize_constant: c > 0.
        num_epochs: how often each example is seen.
        optimizer: "adamw" or "sgd".
        learning_rate: its highest value, after `warmup_steps` optimizer steps; then it falls along half a cosine.
        warmup_steps: optimizer steps until then.
        final_share: of the highest learning rate, towards which it falls: the step after the last would have it.
        weight_decay: of AdamW and SGD alike.
        max_norm: the gradient is clipped to this length before the optimizer steps; infinity never clips.
        seed: of the order of the examples.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """

    rule: str = "token_mean"
    microbatch_size: int = 16
    gradient_accumulation_steps: int = 4
    normalize_constant: float = 1.0
    num_epochs: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_share: float = 0.05
    weight_decay: float = 0.01
    max_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks.check_rule(self.rule)
        checks.check_steps(self.gradient_accumulation_steps)
        checks.check_constant(self.normalize_constant, torch.float32)
        for name, low in (("microbatch_size", 1), ("num_epochs", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name}: got {value!r}; expected an integer of at least {low}")
        for name, fits, expected in (
            ("learning_rate", lambda value: 0 < value < math.inf, "a finite number above 0"),
            ("final_share", lambda value: 0 < value <= 1, "a number above 0 up to 1"),
            ("weight_decay", lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
            ("max_norm", lambda value: value > 0, "a number above 0"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise ValueError(f"{name}: got {value!r}; expected {expected}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: got {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")


def learning_rate_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0: a straight line up, then half a cosine down.

    Source:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (2017), one cycle of it.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    share = config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * share


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with the betas that language models are trained with, or plain SGD."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    betas = (0.9, 0.95)
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)
