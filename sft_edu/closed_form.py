"""The loss and its gradients by hand.

Nothing here uses autograd, `step.py` or `scaling.py`: two authors wrote the same mathematics, so agreement is evidence.
With D the denominator and m the mask,

    loss                 = -(1/D) sum_bt m_bt log p_bt
    d loss / d log p_bt  = -m_bt / D
    d loss / d z_btv     = m_bt (softmax(z_bt)_v - [v = label_bt]) / D

The last line holds because log p_bt = z_bt,label - logsumexp(z_bt), and the derivative of logsumexp is softmax.
Source: Goodfellow, Bengio and Courville, Deep Learning, section 6.2.2.3.
"""

from __future__ import annotations

import torch


def denominator(
    rule: str,
    response_mask: torch.Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
    minibatch_tokens: int | None = None,
) -> float:
    """D of a rule for one microbatch, a Python number.

    Args:
        rule: `notes`, `microbatch_mean`, `sequence_mean`, `microbatch_token_mean` or `token_mean`.
        response_mask: `[B, T]`, 0 and 1, any dtype.
        gradient_accumulation_steps: G.
        normalize_constant: c; the two rules by token count do not depend on it.
        minibatch_tokens: N, needed by `token_mean`.

    Raises:
        ValueError: no rule has that name, or it needs N.
    """
    steps, constant = gradient_accumulation_steps, normalize_constant
    match rule:
        case "notes":
            return constant * steps**2
        case "microbatch_mean":
            return constant * steps
        case "sequence_mean":
            return constant * response_mask.shape[0] * steps
        case "microbatch_token_mean":
            return max(int(response_mask.bool().sum()), 1) * steps
        case "token_mean":
            if minibatch_tokens is None:
                raise ValueError("minibatch_tokens: got None; expected N, which rule 'token_mean' divides by")
            return minibatch_tokens
    raise ValueError(f"rule: got {rule!r}; expected the name of a rule")


def loss(policy_log_probs: torch.Tensor, response_mask: torch.Tensor, denominator: float) -> torch.Tensor:
    """`-(sum of log-probs under the mask) / D`, 0-dim, in the dtype of `policy_log_probs` `[B, T]`."""
    return -policy_log_probs.detach()[response_mask.bool()].sum() / denominator


def grad_log_probs(response_mask: torch.Tensor, denominator: float, dtype: torch.dtype) -> torch.Tensor:
    """d loss / d log p, `[B, T]`: -1/D where the mask is 1, exactly 0 elsewhere."""
    return torch.zeros(response_mask.shape, dtype=dtype).masked_fill(response_mask.bool().cpu(), -1 / denominator)


def grad_logits(
    logits: torch.Tensor, labels: torch.Tensor, response_mask: torch.Tensor, denominator: float
) -> torch.Tensor:
    """d loss / d logits, `[B, T, V]`, from logits `[B, T, V]` and labels `[B, T]`."""
    shifted = (logits.detach() - logits.detach().amax(-1, keepdim=True)).exp()
    probabilities = shifted / shifted.sum(-1, keepdim=True)
    targets = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return response_mask.bool().unsqueeze(-1) * (probabilities - targets) / denominator
