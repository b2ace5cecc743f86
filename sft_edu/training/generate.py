"""Greedy answers of a model."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sft_edu.head import selected_logits

_TOGETHER = 128  # prompts in one forward pass


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Look at a model in the middle of its training: in eval mode, without gradients, with random numbers of its own.

    Afterwards each of its modules is in the mode that it was in, and the random number generators stand where they
    stood, so that a training run goes on bit for bit as if nobody had looked.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    # fork_rng knows no mps.
    accelerators = {} if device.type in ("cpu", "mps") else {"devices": [device], "device_type": device.type}
    try:
        # On another thread, putting a generator back would take back what the main one has drawn meanwhile.
        alone = threading.current_thread() is threading.main_thread()
        with torch.no_grad(), torch.random.fork_rng(**({"devices": []} | accelerators), enabled=alone):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | Collection[int],
    pad_token_id: int = 0,
    context_length: int | None = None,
) -> list[list[int]]:
    """The most probable next token, again and again, until eos.

    Prompts of different lengths run together, padded on the right: a causal model never looks ahead, so what stands
    behind the last token does not matter. Every token costs a full forward pass; nothing is cached.

    Args:
        model: returns logits `[B, T, V]`, or an object whose `.logits` they are. See `undisturbed`.
        prompts: token ids, at least one each.
        max_new_tokens: the longest answer, eos included.
        eos_token_id: ends an answer, and is its last token; without it the answer was cut. It may be several.
        pad_token_id: any token of the vocabulary.
        context_length: the longest input that the model reads; an answer is cut there. None if it has no limit.

    Returns:
        The new token ids of each prompt.
    """
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    with undisturbed(model):
        return [
            answer
            for start in range(0, len(prompts), _TOGETHER)
            for answer in _greedy(
                model, prompts[start : start + _TOGETHER], max_new_tokens, ends, pad_token_id, context_length
            )
        ]


def _greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: set[int],
    pad: int,
    context_length: int | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.full((len(prompts), int(lengths.max()) + max_new_tokens), pad, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows, ends = torch.arange(len(prompts), device=device), lengths.clone()
    stops = torch.tensor(sorted(eos), device=device)
    longest = tokens.shape[1] if context_length is None else context_length
    unfinished = lengths <= longest
    for _ in range(max_new_tokens):
        if not unfinished.any():
            break
        length = int(ends[unfinished].max())
        last = (rows * length + ends - 1)[unfinished]
        new = selected_logits(model, tokens[:, :length], last).argmax(-1)
        tokens[rows[unfinished], ends[unfinished]] = new
        ends += unfinished
        unfinished[unfinished.clone()] = ~torch.isin(new, stops)
        unfinished &= ends <= longest
    spans = zip(tokens.tolist(), lengths.tolist(), ends.tolist(), strict=True)
    return [row[start:end] for row, start, end in spans]
