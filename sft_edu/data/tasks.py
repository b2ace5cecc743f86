"""Small instructions that a tiny model can really learn: the test words are never trained on."""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from typing import Literal

from sft_edu.data.examples import Example

TASKS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "first": lambda word: word[0],
}
"""Name of a task -> what it asks for. `reverse: cat` wants `tac`."""

SHORTEST, LONGEST = 3, 6  # letters of a word
_HELD_OUT = 10  # every tenth word


def make_examples(num_examples: int, *, seed: int = 0, split: Literal["train", "test"] = "train") -> list[Example]:
    """Instructions about random words of 3 to 6 letters.

    Train and test have no word in common, so a model that answers test examples has learned the task and not the
    answers. The same arguments give the same examples on every machine.

    Args:
        num_examples: at least 1.
        seed: of the words and tasks.
        split: "train" or "test".

    Raises:
        ValueError: the text names the argument, what was given and what is expected.
    """
    if type(num_examples) is not int or num_examples < 1:
        raise ValueError(f"num_examples: got {num_examples!r}; expected an integer of at least 1")
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}; expected 'train' or 'test'")
    random_choice = random.Random(f"{seed} {split}")
    examples: list[Example] = []
    while len(examples) < num_examples:
        letters = random_choice.choices(string.ascii_lowercase, k=random_choice.randint(SHORTEST, LONGEST))
        word, task = "".join(letters), random_choice.choice(list(TASKS))
        if _is_held_out(word) == (split == "test"):
            examples.append(Example(f"{task}: {word}\n", TASKS[task](word)))
    return examples


def _is_held_out(word: str) -> bool:
    return zlib.crc32(word.encode()) % _HELD_OUT == 0  # Python's own hash differs from run to run
