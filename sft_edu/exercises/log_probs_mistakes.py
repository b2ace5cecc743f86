"""What people return instead of the log-probability of each label."""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import torch

from sft_edu.exercises.verdict import close

_OTHER = "At each position, normalise the logits over the vocabulary, take logs, and pick the entry of the label."
_SHIFTED = "The labels are shifted already: position t of the logits belongs to label t. Do not shift once more."


def named_mistake(
    found: torch.Tensor, logits: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[str, str]:
    """Code and hint for wrong log-probs, from logits `[B, T, V]` in which no two mistakes look alike."""
    for code, hint, value in _known(logits, input_ids, labels):
        if close(found, value):
            return code, hint
    if found.shape != labels.shape:
        return "wrong-shape", f"Got shape {list(found.shape)}; expected [B, T], here {list(labels.shape)}."
    return "other", _OTHER


def _known(
    logits: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[str, str, torch.Tensor]]:
    every, index = logits.log_softmax(-1), labels.unsqueeze(-1)
    right = every.gather(-1, index).squeeze(-1)
    yield "no-log", "Those are probabilities. Their logarithm is missing.", right.exp()
    yield "not-normalized", "Those are logits. Normalise them over the vocabulary.", logits.gather(-1, index)[..., 0]
    yield "wrong-sign", "Those are -log p. The step negates later; return log p.", -right
    yield "scores-inputs", "Those are the tokens that the model read, not the labels.", _picked(every, input_ids)
    yield from (("shifted", _SHIFTED, value) for value in _shifted(every, labels))
    for dim in (0, 1):
        over = logits.log_softmax(dim).gather(-1, index).squeeze(-1)
        yield "softmax-dim", "The softmax runs over another dimension than the vocabulary, the last.", over
    along_positions = every.gather(1, index).squeeze(-1)
    yield "gather-dim", "The gather runs along positions. The label is an index into the vocabulary.", along_positions
    yield "vocabulary-mean", "That is a mean over the vocabulary. Pick the label.", every.mean(-1)
    yield "vocabulary-sum", "That is a sum over the vocabulary. Pick the label.", every.sum(-1)
    yield "entropy", "That is the entropy. It asks about all tokens; log p asks about the label.", _entropy(every)
    yield "entropy", "That is minus the entropy. It asks about all tokens, log p about the label.", -_entropy(every)
    yield "log-of-sum", "That is the logarithm of a sum: the normaliser alone.", logits.logsumexp(-1)
    yield "best-token", "That is the likeliest token, not the label.", every.max(-1).values
    yield from (("log-base", "The logarithm has another base. Use nats.", right / log(base)) for base in (2, 10))
    yield "summed", "That is one number for each sequence. Keep one for each token.", right.sum(-1)
    yield "summed", "That is one number for all. Keep one for each token.", right.sum()
    yield "summed", "That is a mean for each sequence. Keep one number for each token.", right.mean(-1)
    yield "summed", "That is a mean over all. Keep one number for each token.", right.mean()
    yield "extra-dimension", "Numbers are right; the shape has a dimension of 1 too many.", right.unsqueeze(-1)
    yield "not-gathered", "That is the whole distribution at each position. Pick the label.", every


def _picked(every: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return every.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _shifted(every: torch.Tensor, labels: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits one position too early, or too late, cut off or rolled round or filled with 0."""
    early, late = _picked(every[:, :-1], labels[:, 1:]), _picked(every[:, 1:], labels[:, :-1])
    zero = torch.zeros_like(early[:, :1])
    for one in (early, late):
        yield from (one, torch.cat([one, zero], 1), torch.cat([zero, one], 1))
    yield from (_picked(every, labels.roll(by, 1)) for by in (1, -1))
    yield from (_picked(every.roll(by, 1), labels) for by in (1, -1))


def _entropy(every: torch.Tensor) -> torch.Tensor:
    return -(every.exp() * every).sum(-1)
