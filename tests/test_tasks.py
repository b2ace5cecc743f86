"""Small tasks: the answers are right, test words are never trained on, and every machine gets the same ones."""

import pytest

from sft_edu.data.examples import Example
from sft_edu.data.tasks import LONGEST, SHORTEST, TASKS, make_examples

PINNED_TRAIN = [
    Example("upper: qprfou\n", "QPRFOU"),
    Example("reverse: bansgx\n", "xgsnab"),
    Example("upper: qlmize\n", "QLMIZE"),
    Example("upper: fsnv\n", "FSNV"),
]
PINNED_TEST = [
    Example("upper: njtjso\n", "NJTJSO"),
    Example("upper: lzekzp\n", "LZEKZP"),
    Example("reverse: wzgzvc\n", "cvzgzw"),
]


def parts(example):
    task, _, rest = example.prompt.partition(": ")
    assert rest.endswith("\n")
    return task, rest.removesuffix("\n"), example.response


def test_the_answers_are_right():
    examples = make_examples(500) + make_examples(500, split="test")
    seen = set()
    for task, word, response in map(parts, examples):
        expected = {"upper": word.swapcase(), "reverse": "".join(reversed(word)), "first": word[:1]}
        assert response == expected[task]
        assert word.isalpha()
        assert word.islower()
        seen.add((task, len(word)))
    assert seen == {(task, length) for task in TASKS for length in range(SHORTEST, LONGEST + 1)}


def test_no_test_word_is_ever_trained_on():
    words = {
        split: {parts(example)[1] for seed in range(3) for example in make_examples(5000, seed=seed, split=split)}
        for split in ("train", "test")
    }
    assert not words["train"] & words["test"]
    assert min(map(len, words.values())) > 5000


def test_every_machine_gets_the_same():
    assert make_examples(4) == PINNED_TRAIN
    assert make_examples(3, seed=7, split="test") == PINNED_TEST
    assert make_examples(40)[:4] == PINNED_TRAIN  # more of them begin alike
    assert make_examples(4, seed=1) != PINNED_TRAIN


@pytest.mark.parametrize("number", [0, -1, True, 2.0, "3", None])
def test_a_number_that_is_none_is_named(number):
    with pytest.raises(ValueError, match=rf"^num_examples: got {number!r}; expected an integer of at least 1"):
        make_examples(number)


@pytest.mark.parametrize("split", ["dev", "", None, 0])
def test_an_unknown_split_is_named(split):
    with pytest.raises(ValueError, match=rf"^split: got {split!r}; expected 'train' or 'test'"):
        make_examples(1, split=split)
