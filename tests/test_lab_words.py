"""What a lab says in words is true after every change: its text, and the descriptions inside its saved pictures."""

import io
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from test_labs_under_threads import expected
from test_widgets import find

from sft_edu import closed_form, get_response_log_probs, saved_bytes, split_minibatch
from sft_edu.digits import fixed
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch
from sft_edu.scaling import RULES
from sft_edu.widgets import AccumulationLab, MaskLab, SavePicture, ScalingLab, StepLab

SVG_TEXT = "{http://www.w3.org/2000/svg}text"
CHANGES = {
    StepLab: [
        {"gradient_accumulation_steps": 7},
        {"normalize_constant": 2.5},
        {"rule": "token_mean"},
        {"mask": [[0, 1, 1, 0], [1, 0, 0, 0]]},
        {"focused_log_prob": -6.25},
        {"rule": "sequence_mean"},
        {"log_probs": [[-1.0, -2.0, -3.0, -4.0]] * 2},
        {"mask": [[0] * 4] * 2},
        {"state": "G=3 c=1 rule=notes mask=1111/1111"},
    ],
    MaskLab: [
        {"preset": "one too late"},
        {"preset": "padding included"},
        {"mask": [[1, 0] * 10 + [1]] * 2},
        {"preset": "all masked"},
        {"preset": "correct"},
    ],
    AccumulationLab: [
        {"played": 1},
        {"played": 4},
        {"rule": "microbatch_token_mean"},
        {"gradient_accumulation_steps": 3},
        {"imbalance": 1.0},
        {"rule": "notes"},
        {"played": 0},
        {"gradient_accumulation_steps": 1, "played": 1},
    ],
    ScalingLab: [{"gradient_accumulation_steps": 3}, {"imbalance": 0.0}, {"imbalance": 0.8}, {"max_norm": 30.0}],
}


def step_facts(lab) -> list[str]:
    """From the closed form, which knows nothing of the step."""
    mask, steps = torch.tensor(lab.mask), lab.gradient_accumulation_steps
    tokens = int(mask.sum())
    denominator = float(closed_form.denominator(lab.rule, mask, steps, lab.normalize_constant, max(tokens, 1) * steps))
    total = float((torch.tensor(lab.log_probs).double() * mask).sum())
    facts = [f"num_tokens {tokens}", f"masked_sum {fixed(total / lab.normalize_constant)}"]
    facts.append(f"scaled_loss {fixed(-total / denominator)}")
    return [*facts, f"gradient {fixed(-1 / denominator if tokens else 0)} where the mask is 1"]


def accumulation_facts(lab) -> list[str]:
    steps, batch = lab.gradient_accumulation_steps, ragged_minibatch(8, lab.imbalance)
    right = expected(steps, lab.rule, lab.imbalance)[lab.played]
    counts = [int(part["response_mask"].sum()) for part in split_minibatch(batch, steps)]
    held = [held_bytes(split_minibatch(batch, parts)[0]) for parts in (steps, 1)]
    return [
        f"Response tokens per microbatch: {' + '.join(map(str, counts))}{f' = {sum(counts)}' * (steps > 1)}.",
        f"length {right.ratio:.4f}x, " + (f"cosine {right.cosine:.4f}" if lab.played else "no direction yet"),
        f"Held for backward: {held[0] / held[1]:.2f} of",
    ]


def held_bytes(batch) -> int:
    model = TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=256).double()
    return saved_bytes(lambda: get_response_log_probs(model, batch["input_ids"], batch["labels"]), model, batch)


def scaling_facts(lab) -> list[str]:
    found = {rule: expected(lab.gradient_accumulation_steps, rule, lab.imbalance)[-1] for rule in RULES}
    exact = [rule for rule, right in found.items() if right.relative_error < 1e-9]
    numbers = [
        f"{rule} {RULES[rule].formula} {fixed(right.ratio)}x {fixed(right.cosine)}" for rule, right in found.items()
    ]
    return [*numbers, f"the gradient of the full batch is reached by {' and '.join(exact)};"]


FACTS = {
    StepLab: step_facts,
    MaskLab: step_facts,
    AccumulationLab: accumulation_facts,
    ScalingLab: scaling_facts,
}


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_text_and_saved_pictures_are_true_after_every_change(kind):
    lab = kind()
    save = find(lab, SavePicture)[0]
    for change in [{}, *CHANGES[kind]]:
        for name, value in change.items():
            setattr(lab, name, value)
        said = " ".join(repr(lab).split())
        assert [fact for fact in FACTS[kind](lab) if fact not in said] == [], change
        svg = ElementTree.fromstring(save.to_bytes("svg"))
        assert svg[1].text == repr(lab)
        assert [text.text for text in svg.iter(SVG_TEXT)][-1] == f"{kind.__name__}: {lab.state}"
        with Image.open(io.BytesIO(save.to_bytes("png"))) as png:
            assert png.info["Description"] == repr(lab)
        assert [number for number in drawn(lab) if number not in [text.text for text in svg.iter(SVG_TEXT)]] == []


def test_a_long_state_stands_in_lines_below_the_picture_and_leaves_it_as_it_was():
    lab = MaskLab(["Capital of Peru? "] * 9, ["Lima"] * 9)
    save, figure = find(lab, SavePicture)[0], lab.figure()
    save.make_figure = lambda: figure
    *_, first, second = ElementTree.fromstring(save.to_bytes("svg")).iter(SVG_TEXT)
    assert (first.text + second.text).replace(" ", "") == f"MaskLab:{lab.state}"
    captioned, plain = (
        Image.open(io.BytesIO(one.to_bytes("png"))).convert("RGB") for one in (save, SavePicture(lambda: figure))
    )
    assert figure.texts == []
    assert captioned.height > plain.height + 40
    assert captioned.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    assert len(captioned.crop((0, plain.height, *captioned.size)).getcolors(9999)) > 9


def drawn(lab) -> list[str]:
    """Numbers that the picture has to have in it."""
    if isinstance(lab, AccumulationLab):
        return [f"{lab.ratio:.4f}x", f"{lab.microbatch_bytes:,}", f"{lab.full_batch_bytes:,}"]
    if isinstance(lab, ScalingLab):
        return [f"{fixed(result['comparison'].ratio)}x" for result in lab.results.values()]
    return [fixed(lab.loss), str(lab.num_tokens)]
