"""Greedy answers of a model, and how many of them are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_TOGETHER = 128  # prompts in one forward pass


@torch.no_grad()
def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int, pad_token_id: int = 0
) -> list[list[int]]:
    """The most probable next token, again and again, until eos.

    Prompts of different lengths run together, padded on the right: a causal model never looks ahead, so what stands
    behind the last token does not matter. Every token costs a full forward pass; nothing is cached.

    Args:
        model: returns logits `[B, T, V]`, or an object whose `.logits` they are. It is in eval mode meanwhile.
        prompts: token ids, at least one each.
        max_new_tokens: the longest answer, eos included.
        eos_token_id: ends an answer, and is its last token; without it the answer was cut.
        pad_token_id: any token of the vocabulary.

    Returns:
        The new token ids of each prompt.
    """
    was_training = model.training
    model.eval()
    try:
        answers = []
        for start in range(0, len(prompts), _TOGETHER):
            answers += _greedy(model, prompts[start : start + _TOGETHER], max_new_tokens, eos_token_id, pad_token_id)
        return answers
    finally:
        model.train(was_training)


def _greedy(model: nn.Module, prompts, max_new_tokens: int, eos: int, pad: int) -> list[list[int]]:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.full((len(prompts), int(lengths.max()) + max_new_tokens), pad, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows, ends = torch.arange(len(prompts), device=device), lengths.clone()
    unfinished = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        output = model(tokens[:, : int(ends.max())])
        logits = getattr(output, "logits", output)
        new = logits[rows, ends - 1].argmax(-1)
        tokens[rows[unfinished], ends[unfinished]] = new[unfinished]
        ends += unfinished
        unfinished &= new != eos
        if not unfinished.any():
            break
    spans = zip(tokens.tolist(), lengths.tolist(), ends.tolist(), strict=True)
    return [row[start:end] for row, start, end in spans]
