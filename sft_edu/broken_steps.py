"""Steps with one mistake each, for lessons to print and to diagnose: they run, return numbers, and raise nothing.

All take log-probs and mask `[B, T]`, G and c, and return a loss and metadata as `sft_microbatch_train_step` does.
"""

from __future__ import annotations

import torch


def without_a_graph(log_probs, mask, steps, constant=1.0):
    scores = torch.tensor(log_probs.tolist(), dtype=log_probs.dtype, requires_grad=True)
    masked_sum = (scores * mask).sum() / constant
    loss = -masked_sum / steps / steps
    loss.backward()
    return loss.detach(), {"masked_sum": masked_sum.detach()}


def backward_twice(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum() / constant
    loss = -masked_sum / steps / steps
    loss.backward(retain_graph=True)
    loss.backward()
    return loss.detach(), {"masked_sum": masked_sum.detach()}


def logs_with_graph(log_probs, mask, steps, constant=1.0):
    masked_sum = (log_probs * mask).sum() / constant
    loss = -masked_sum / steps / steps
    loss.backward()
    mean_p = (log_probs.exp() * mask).sum() / mask.sum()
    return loss.detach(), {"masked_sum": masked_sum.detach(), "mean_p": mean_p}


def mask_counts_only(log_probs, mask, steps, constant=1.0):
    num_tokens = mask.sum()
    loss = -log_probs.sum() / constant / steps / steps
    loss.backward()
    return loss.detach(), {"num_tokens": num_tokens}


def to_mend(log_probs, mask, steps, minibatch_tokens):
    masked_sum = (log_probs * mask).sum()
    num_tokens = mask.sum()
    loss = masked_sum / num_tokens / steps
    loss.backward()
    return loss, {"masked_sum": masked_sum, "num_tokens": num_tokens}
