"""The wrong masks are wrong in the way their names say."""

import pytest
import torch

from sft_edu import ByteTokenizer, tokenize_prompt_and_output
from sft_edu.masks import PRESETS, token_roles

TOKENIZER = ByteTokenizer()
BATCH = tokenize_prompt_and_output(["pp", "p"], ["rrr", "r"], TOKENIZER, append_eos=True)
CORRECT = BATCH["response_mask"]  # labels: p r r r eos, r eos pad pad pad


def test_roles_name_each_label():
    assert token_roles(CORRECT) == [
        ["prompt", "response", "response", "response", "response"],
        ["response", "response", "padding", "padding", "padding"],
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("correct", ["01111", "11000"]),
        ("prompt leaked in", ["11111", "11000"]),
        ("one too late", ["00111", "01100"]),
        ("one too early", ["11110", "10000"]),
        ("eos missing", ["01110", "10000"]),
        ("padding included", ["01111", "11111"]),
        ("all masked", ["00000", "00000"]),
    ],
)
def test_each_preset_selects_what_its_name_says(name, expected):
    mask = PRESETS[name].make(CORRECT)
    assert ["".join(str(int(value)) for value in row) for row in mask] == expected


def test_every_preset_is_tested_and_differs_from_the_correct_mask():
    assert len(PRESETS) == 7
    assert [name for name, preset in PRESETS.items() if preset.make(CORRECT).equal(CORRECT)] == ["correct"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_preset_leaves_the_correct_mask_alone_and_keeps_its_shape(preset):
    before = CORRECT.clone()
    mask = preset.make(CORRECT)
    assert mask.shape == CORRECT.shape
    assert mask.dtype == torch.bool
    assert CORRECT.equal(before)


def test_eos_missing_leaves_out_exactly_the_eos_labels():
    left_out = BATCH["labels"][CORRECT & ~PRESETS["eos missing"].make(CORRECT)]
    assert left_out.tolist() == [TOKENIZER.eos_token_id] * 2
