"""What is held out: the share that was asked for, and no question on both sides. And what can be read."""

import pytest

from sft_edu.data.examples import Conversation, Example, FieldError, Message, check_example, held_out


def asked(*times: int) -> list[Example]:
    """Examples of so many questions, each asked so many times."""
    return [Example(f"question {number}", f"{turn}") for number, count in enumerate(times) for turn in range(count)]


@pytest.mark.parametrize(
    ("times", "share", "wanted"),
    [
        ((90, *[1] * 10), 0.1, 10),
        ((90, *[1] * 5), 0.1, 5),  # all that may be
        ((5, 5, 5, 5), 0.1, 5),  # no question is asked twice alone: the least that can be
        ((7, 4), 0.1, 4),
        ((1,) * 20, 0.25, 5),
        ((1,) * 5, 0.01, 1),
        ((1,) * 5, 1.0, 4),  # one is left to train on
        ((3, 3), 0.0, 0),
    ],
)
def test_a_question_that_is_asked_often_is_not_held_out_in_place_of_a_few(times, share: float, wanted: int):
    examples = asked(*times)
    for seed in range(20):
        chosen = held_out(examples, share, seed=seed)
        assert sum(chosen) == wanted
        sides = [{e.prompt for e, is_held in zip(examples, chosen, strict=True) if is_held == side} for side in (0, 1)]
        assert sides[0].isdisjoint(sides[1])


def test_the_same_question_in_another_form_is_the_same():
    question = Message("user", "2 + 2")
    talks = [Conversation((question, Message("assistant", "4"))), Example("2 + 2", "four"), Example("1 + 1", "2")]
    assert {tuple(held_out(talks, 0.4, seed=seed)) for seed in range(20)} == {(False, False, True)}
    with pytest.raises(ValueError, match="all ask the same"):
        held_out(talks[:2], 0.4)


def test_the_choice_follows_from_the_seed():
    examples = asked(*[1] * 20)
    assert held_out(examples, 0.2, seed=1) == held_out(examples, 0.2, seed=1) != held_out(examples, 0.2, seed=2)


@pytest.mark.parametrize("times", [1, 3])
def test_examples_that_all_ask_the_same_cannot_be_divided(times: int):
    with pytest.raises(ValueError, match=rf"held_out: got 0\.1 of {times} examples that all ask the same"):
        held_out(asked(times), 0.1)


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", " \u200d\u00ad\n", "\u202e"])
def test_what_nobody_can_see_is_no_text(text: str):
    with pytest.raises(FieldError, match="got text of invisible characters alone; expected text to read"):
        check_example(Example("a question", text))
    check_example(Example("a question", f"{text}x"))
