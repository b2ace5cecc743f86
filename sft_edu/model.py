"""A tiny causal language model over bytes: small enough for a lesson, built like the large ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TinyLM(nn.Module):
    """A pre-norm transformer decoder. With its default sizes it has about 0.14 million parameters.

    All weights come from `seed` and are float32, whatever the default dtype is; the global random number generator is
    neither read nor changed. The output layer is scaled so that an untrained model has opinions (logits of about
    +-1), and its log-probs are not all the same.

    Args:
        vocab_size: V, tokens it can read and predict; 259 fits `ByteTokenizer`.
        d_model: width of the residual stream.
        num_layers: blocks of attention and feed-forward.
        num_heads: attention heads; divides `d_model`.
        context_length: the longest sequence it can read.
        seed: of the weights.

    Raises:
        ValueError: `num_heads` does not divide `d_model`.
    """

    def __init__(
        self,
        vocab_size: int = 259,
        d_model: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        context_length: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; expected a divisor of d_model, {d_model}")
        self.context_length = context_length
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            # From weights that are there: on the meta device their own initialisation loads a compiler, for seconds.
            self.token_embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, d_model), freeze=False)
            self.position_embedding = nn.Embedding.from_pretrained(torch.empty(context_length, d_model), freeze=False)
            self.blocks = nn.ModuleList(_Block(d_model, num_heads) for _ in range(num_layers))
            self.final_norm = nn.LayerNorm(d_model)
            self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.float().to_empty(device="cpu")
        self._initialise(torch.Generator().manual_seed(seed))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` for the token after each of `input_ids` `[B, T]`."""
        length = input_ids.shape[1]
        if length > self.context_length:
            raise ValueError(f"input_ids: got {length} tokens; expected at most {self.context_length}")
        positions = torch.arange(length, device=input_ids.device)
        hidden = self.token_embedding(input_ids) + self.position_embedding(positions)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.final_norm(hidden))

    def get_output_embeddings(self) -> nn.Linear:
        """The projection onto the vocabulary, under the name that Hugging Face models have for it."""
        return self.head

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                fan_in = 1 if "embedding" in name else parameter.shape[1]
                parameter.normal_(std=fan_in**-0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


class _Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.attention_output = nn.Linear(d_model, d_model)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self._attend(self.attention_norm(hidden))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))

    def _attend(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        heads = self.query_key_value(hidden).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_output(attended.transpose(1, 2).reshape(batch, length, width))


def default_device() -> torch.device:
    """The accelerator of this machine (cuda, mps or xpu) if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
