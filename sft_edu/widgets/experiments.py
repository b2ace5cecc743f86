"""The runs that the labs on whole minibatches show, each computed once and remembered for a while."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch

from sft_edu.accumulate import Accumulation, Batch, accumulate, full_batch_gradient, split_minibatch
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch

_running = threading.Lock()  # the labs share the model, so they take turns at its `.grad`


@lru_cache(maxsize=1)
def model() -> TinyLM:
    """A very small model in float64, so that gradients can be compared to the last digits."""
    return TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=256).double()


@lru_cache(maxsize=8)
def minibatch(num_sequences: int, imbalance: float) -> Batch:
    return ragged_minibatch(num_sequences, imbalance)


@lru_cache(maxsize=16)
def reference(num_sequences: int, imbalance: float) -> torch.Tensor:
    """The gradient of the full batch, the mean over its response tokens."""
    return full_batch_gradient(model(), minibatch(num_sequences, imbalance))


@lru_cache(maxsize=32)
def accumulated(
    num_sequences: int, imbalance: float, steps: int, rule: str, keep_running: bool = False
) -> Accumulation:
    """What `steps` microbatches accumulate to under a rule."""
    microbatches = split_minibatch(minibatch(num_sequences, imbalance), steps)
    with _running:
        return accumulate(model(), microbatches, rule=rule, keep_running=keep_running)
