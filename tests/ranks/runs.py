"""The small runs that ranks are tried with."""

import torch

from sft_edu.data.encode import Encoded, encode
from sft_edu.data.tasks import make_examples
from sft_edu.model import TinyLM
from sft_edu.tokens import ByteTokenizer


def encoded(count: int, seed: int = 0) -> list[Encoded]:
    """Responses of very unequal lengths: one token and eos in every third example, most of a sequence elsewhere."""
    sequences = []
    for index, (ids, is_response) in enumerate(encode(make_examples(count, seed=seed), ByteTokenizer())):
        start = 1 if index % 3 else len(ids) - 2
        sequences.append(Encoded(ids, (False,) * start + (True,) * (len(is_response) - start)))
    return sequences


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyLM:
    return TinyLM(d_model=32, num_layers=2, num_heads=2, context_length=32, seed=seed).to(dtype)
