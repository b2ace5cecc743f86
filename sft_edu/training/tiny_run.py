"""The run that a laptop does in half a minute: a model that cannot answer learns the built-in tasks."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

import torch

from sft_edu.data.examples import Example
from sft_edu.data.tasks import make_examples
from sft_edu.model import TinyLM
from sft_edu.training.train_config import TrainConfig
from sft_edu.training.whole_file import write_whole

_TOGETHER, _STEPS = 64, 800
NUM_HELD_OUT = 300
TINY_LENGTH = 257
"""Tokens of the longest sequence that the tiny model is trained on: one more than it reads."""

TINY_CONFIG = TrainConfig(
    microbatch_size=16,
    gradient_accumulation_steps=_TOGETHER // 16,
    learning_rate=3e-3,
    warmup_steps=50,
)
"""How the tiny model learns the built-in tasks: each of the examples once, 64 sequences in an optimizer step."""

_SIZES = {"d_model": 96, "num_layers": 2, "num_heads": 4}


def tiny_model(context_length: int = TINY_LENGTH - 1, seed: int = 0) -> TinyLM:
    """A byte model of 0.3 million parameters, untrained. It reads inputs of up to `context_length` tokens."""
    return TinyLM(**_SIZES, context_length=context_length, seed=seed)


def save_tiny_model(model: TinyLM, path: str | os.PathLike) -> Path:
    """Write the weights of a tiny model into a file, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return write_whole(path, buffer.getbuffer())


def load_tiny_model(path: str | os.PathLike) -> TinyLM:
    """The model that `save_tiny_model` wrote.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        model = tiny_model(len(state["position_embedding.weight"]))
        model.load_state_dict(state)
    except Exception as error:  # whatever a file that is no such model makes of it
        raise ValueError(f"{path}: got a file that holds no tiny model; expected what save_tiny_model wrote") from error
    return model


def tiny_examples(split: Literal["train", "test"] = "train", seed: int = 0) -> list[Example]:
    """Built-in examples: 51,200 to train on, or 300 held out, with other words."""
    return make_examples(_TOGETHER * _STEPS if split == "train" else NUM_HELD_OUT, seed=seed, split=split)
