"""The page's arithmetic, which runs ahead of the kernel, against the kernel's autograd: the same texts."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch

from sft_edu import RULES, checks
from sft_edu.scaling import Rule
from sft_edu.widgets import StageChain, StepLab, step_ahead, step_lab

HERE = Path(__file__).parent
WIDGETS = HERE.parent / "sft_edu" / "widgets"
SHAPES = [(1, 1), (1, 24), (2, 4), (2, 12), (3, 7), (4, 5), (8, 3), (9, 2)]
EQUAL = 0.98  # of the texts, at least; the others differ in their last digit
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?(?:e([+-]\d+))?")
AHEAD = "(one) => module.stagesAhead({ ...one.inputs, rule: one.ahead.rules[one.inputs.rule] })"


@pytest.mark.parametrize("name", ["step_ahead", "inputs_ahead"])
def test_the_page_alone(node, name):
    answer = node("--test", str(HERE / "js" / f"{name}.test.mjs"))
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_three_files_are_one_module_that_renders(evaluate):
    esm = str(StageChain._esm)
    assert evaluate(esm, "[typeof module.default.render, typeof module.render]") == ["function", "undefined"]
    assert "import " not in "".join(line for line in esm.splitlines() if not line.startswith("//"))


def chains(rules, count, seed):
    """Chains of step labs under random settings, as the page gets them."""
    draw, next_rule = random.Random(seed), itertools.cycle(rules)
    torch.manual_seed(seed)
    for shape in SHAPES:
        lab = StepLab(-torch.rand(shape) * 10 ** draw.uniform(-2, 1), torch.ones(shape), rule=next(next_rule))
        model, slider = lab.log_probs, (torch.rand(shape) * 100).round() / -10
        for _ in range(count // len(SHAPES)):
            constants = (1.0, 0.1, 100.0, draw.randint(1, 9) / 2, 10 ** draw.uniform(-1, 2))
            lab._apply(
                {
                    "gradient_accumulation_steps": draw.randint(1, 32),
                    "normalize_constant": draw.choice(constants),
                    "rule": next(next_rule),
                    "mask": (torch.rand(shape) < draw.choice((0, 0.2, 0.6, 1))).int(),
                    "log_probs": draw.choice((model, slider)),
                }
            )
            yield lab._chain.get_state(["stages", "inputs", "ahead"])


def check_against_autograd(evaluate, chains):
    source = (WIDGETS / "step_ahead.js").read_text(encoding="utf-8")
    pairs = []
    for chain, ahead in zip(chains, evaluate(source, f"{json.dumps(chains)}.map({AHEAD})"), strict=True):
        assert list(ahead) == [stage["name"] for stage in chain["stages"]]
        for stage in chain["stages"]:
            mine = ahead[stage["name"]]
            assert mine["symbolic"] == stage["symbolic"]
            pairs += [(mine[part], stage[part]) for part in ("numeric", "value")]
    for mine, kernels in pairs:
        assert NUMBER.sub("#", mine) == NUMBER.sub("#", kernels)
        for one, other in zip(NUMBER.finditer(mine), NUMBER.finditer(kernels), strict=True):
            assert abs(float(one[0]) - float(other[0])) <= tolerance(one, other), (mine, kernels)
    assert sum(mine == kernels for mine, kernels in pairs) >= EQUAL * len(pairs)


def tolerance(*numbers):
    """One unit of the last digit printed or, where float32 is coarser than that, the few bits that a sum may spend."""
    units = [10.0 ** (int(number[2] or 0) - len(number[1] or "")) for number in numbers if number[1]]
    return max([1.01 * unit for unit in units] + [2**-21 * abs(float(numbers[0][0]))])


def test_one_message_of_the_chain_has_all_and_comes_before_the_controls(monkeypatch):
    """A control that came first would be taken for a hand."""
    lab, sent = StepLab(), []

    def listen(name, widget):
        monkeypatch.setattr(widget, "_send", lambda message, buffers=None: sent.append((name, message["state"])))

    listen("chain", lab._chain)
    listen("mask", lab._token_mask)
    for name, control in lab._controls.items():
        listen(name, control)
    lab._apply({"gradient_accumulation_steps": 5, "mask": [[0, 1, 1, 1]] * 2, "log_probs": [[-1.0] * 4] * 2})
    names = [name for name, _ in sent]
    assert names == ["chain", "mask", "focused_log_prob", "gradient_accumulation_steps"]
    assert set(sent[0][1]) == {"stages", "inputs", "words", "detail", "drawn"}
    assert sent[0][1]["inputs"]["steps"] == 5


def test_the_texts_are_those_of_autograd(evaluate):
    sent = list(chains(RULES, 320, seed=0))
    assert {chain["inputs"]["rule"] for chain in sent} == set(RULES)
    assert any(chain["stages"][0]["value"] == "0" for chain in sent)
    check_against_autograd(evaluate, sent)


def test_a_rule_that_is_new_in_scaling_needs_no_other_page(evaluate, monkeypatch):
    new = {
        name: Rule(name, first, second, uses_constant, used_by="nobody", accumulates_to="?")
        for first, second, uses_constant in itertools.product("1BGnN", "1BGnN", (True, False))
        for name in [f"{first} {second} {uses_constant}"]
    }
    for module in (checks, step_ahead, step_lab):
        monkeypatch.setattr(module, "RULES", new)
    check_against_autograd(evaluate, list(chains(new, 400, seed=1)))
