"""What is said before a run: the mask can be seen with colour and without, and the arithmetic is that of the run."""

import json
import re

import pytest
from test_encode import CHATML, hugging_face
from test_scaling import FORMULAS

from sft_edu.commands.dry_run import describe_run, show_mask
from sft_edu.commands.prepare_run import prepare_run
from sft_edu.commands.run_settings import RunSettings
from sft_edu.data.encode import encode
from sft_edu.data.examples import Conversation, Example, Message
from sft_edu.scaling import RULES
from sft_edu.tokens import ByteTokenizer

BYTES = ByteTokenizer()


def shown(example, tokenizer=BYTES, **options) -> str:
    return show_mask(encode([example], tokenizer)[0], tokenizer, **options)


def test_what_is_trained_on_stands_between_marks():
    assert shown(Example("2 + 2 =", " 4")) == "2␣+␣2␣=⟦␣4<eos>⟧"
    talk = Conversation(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    )
    assert shown(talk) == "user:⏎a⏎assistant:⏎⟦b<eos>⟧⏎user:⏎c⏎assistant:⏎⟦d<eos>⟧"
    assert "<|im_start|>assistant⏎⟦b<|im_end|>⟧" in shown(talk, hugging_face(CHATML))


def test_colour_is_an_addition():
    plain, coloured = (shown(Example("a", "b"), colour=colour) for colour in (False, True))
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert coloured == "a\x1b[30;46m⟦b<eos>⟧\x1b[0m"


def test_characters_of_several_tokens_are_whole_and_a_terminal_obeys_none():
    assert shown(Example("ä😀", "\x1b[2J\u202e\0"[:-1])) == "ä😀⟦x1b[2Jx202e<eos>⟧"


def test_long_sequences_are_cut():
    text = shown(Example("a" * 5000, "b"))
    assert len(text) < 2100
    assert text.endswith("…")
    assert "⟧" in shown(Example("a", "b" * 5000))


@pytest.mark.parametrize("rule", RULES)
def test_the_arithmetic_is_that_of_the_run(tmp_path, rule: str):
    path = tmp_path / "mine.jsonl"
    examples = [{"prompt": f"{number} + 1 =", "response": f"{number + 1}"} for number in range(50)]
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    plan = {"microbatch_size": 3, "gradient_accumulation_steps": 4, "normalize_constant": 2.5}  # those of FORMULAS
    run = prepare_run(RunSettings(data=str(path), rule=rule, num_epochs=2, **plan), "cpu")
    text = describe_run(run)
    training = run.training
    first = training.minibatch()
    assert text.count("⟦") == 3 + 1
    assert "45 to train on, 5 held out" in text
    assert "3 sequences x 4 microbatches = 12 sequences" in text
    assert "45 sequences / 12 = 4 optimizer steps, the last with 9 in 3 microbatches" in text
    assert "4 x 2 epochs = 8 steps" in text
    assert "learning rate up to 0.003 after 0 warm-up steps, then down towards 0.00015" in text
    inside = [sum(sum(sequence.is_response) for sequence in microbatch) for microbatch in first]
    formula, denominator = FORMULAS[rule]
    assert f"{rule}, D = {formula}; in the first microbatch D = {denominator(inside[0], sum(inside)):g}\n" in text
    assert f"the first has {sum(inside):,} response tokens" in text
    labels, response, prompt, padding = map(
        int, re.search(r"= (\d+): (\d+) response, (\d+) prompt, (\d+) pad", text).groups()
    )
    assert (labels, response) == (response + prompt + padding, inside[0])
    record = next(iter(training))
    assert record.num_tokens == sum(inside)
