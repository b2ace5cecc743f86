"""The run that a laptop does in half a minute: a model that cannot answer learns the built-in tasks."""

from __future__ import annotations

from typing import Literal

from sft_edu.examples import Example
from sft_edu.model import TinyLM
from sft_edu.tasks import make_examples
from sft_edu.train import TrainConfig

_LONGEST_TASK = 32  # tokens of a built-in example, and some to spare
_TOGETHER, _STEPS = 64, 600
NUM_HELD_OUT = 300

TINY_CONFIG = TrainConfig(
    microbatch_size=16,
    gradient_accumulation_steps=_TOGETHER // 16,
    learning_rate=3e-3,
    warmup_steps=50,
)
"""How the tiny model learns the built-in tasks: each of the examples once, 64 sequences in an optimizer step."""


def tiny_model(context_length: int = _LONGEST_TASK, seed: int = 0) -> TinyLM:
    """A byte model of 0.28 million parameters, untrained. It reads inputs of up to `context_length` tokens."""
    return TinyLM(d_model=96, num_layers=2, num_heads=4, context_length=context_length, seed=seed)


def tiny_examples(split: Literal["train", "test"] = "train", seed: int = 0) -> list[Example]:
    """Built-in examples: 38,400 to train on, or 300 held out, with other words."""
    return make_examples(_TOGETHER * _STEPS if split == "train" else NUM_HELD_OUT, seed=seed, split=split)
