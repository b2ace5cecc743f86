"""A small minibatch of real text, whose responses are as unequal in length as one likes."""

from __future__ import annotations

import itertools
import random

import torch

from sft_edu.tokens import ByteTokenizer, Tokenizer, tokenize_prompt_and_output

# 24 is the least mean at which two sequences, 16:1, are both at least as long as the shortest word.
_MEAN_LENGTH, _LONGEST_TO_SHORTEST = 24, 16
_WORDS = {
    3: ("cat", "dog", "owl", "hen"),
    4: ("frog", "bear", "duck", "wolf"),
    5: ("tiger", "horse", "zebra", "mouse"),
    6: ("rabbit", "donkey", "turtle", "monkey"),
}


def ragged_minibatch(
    num_sequences: int, imbalance: float, tokenizer: Tokenizer | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A small minibatch whose responses are equally or unequally long: `upper: cat owl` and `CAT OWL`.

    Response lengths are a geometric series in shuffled order. They add up to 24 characters per sequence, whatever the
    imbalance: with `ByteTokenizer` that is the exact number of response tokens, with another tokenizer it is near.
    The same arguments give the same minibatch everywhere; no global random number generator is read or changed.

    Args:
        num_sequences: N >= 1.
        imbalance: from 0, all responses equally long, to 1, the longest about 16 times as long as the shortest.
        tokenizer: a `ByteTokenizer` when None.
        seed: of the words and of the order of the lengths.

    Returns:
        What `tokenize_prompt_and_output` returns, on the CPU.

    Raises:
        TypeError, ValueError: the text names the argument, what was given and what is expected.
    """
    if type(num_sequences) is not int or num_sequences < 1:
        raise ValueError(f"num_sequences: got {num_sequences!r}; expected an integer of at least 1")
    if not 0 <= imbalance <= 1:
        raise ValueError(f"imbalance: got {imbalance!r}; expected a number from 0 to 1")
    generator = random.Random(seed)
    lengths = _ragged_lengths(num_sequences, imbalance)
    generator.shuffle(lengths)
    texts = [_words(length, generator) for length in lengths]
    prompts, outputs = [f"upper: {text}\n" for text in texts], [text.upper() for text in texts]
    return tokenize_prompt_and_output(prompts, outputs, tokenizer or ByteTokenizer())


def _ragged_lengths(num_sequences: int, imbalance: float) -> list[int]:
    """Ascending. The running total is rounded, not each length, so that the sum is exact."""
    last = max(num_sequences - 1, 1)
    weights = [_LONGEST_TO_SHORTEST ** (imbalance * i / last) for i in range(num_sequences)]
    per_weight = num_sequences * _MEAN_LENGTH / sum(weights)
    edges = [round(per_weight * total) for total in itertools.accumulate(weights, initial=0)]
    return [end - start for start, end in itertools.pairwise(edges)]


def _words(length: int, generator: random.Random) -> str:
    """Words with spaces between them, `length` >= 3 characters in all."""
    words = []
    while length > 6:
        size = generator.randint(3, min(6, length - 4))  # leaves room for a space and another word
        words.append(generator.choice(_WORDS[size]))
        length -= size + 1
    return " ".join([*words, generator.choice(_WORDS[length])])
