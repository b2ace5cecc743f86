"""Eight threads at once, as pages and a busy cell may be: each lab shows what it computed, and that is right.

A round is one event on each of eight threads, all let go at the same moment. After each round everything is compared.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from functools import cache

import ipywidgets
import numpy as np
import pytest
import torch
from test_widgets import MASK, expected_gradient, find

from sft_edu import TinyLM, accumulate, compare, full_batch_gradient, split_minibatch
from sft_edu.digits import fixed
from sft_edu.ragged import ragged_minibatch
from sft_edu.scaling import RULES
from sft_edu.widgets import AccumulationLab, Bars, MaskLab, ScalingLab, StageChain, StepLab, TokenMask, experiments

ROUNDS = 200
RULE_NAMES = list(RULES)
MASKS = [torch.roll(MASK, turn, 1) for turn in range(4)]
# What a thread may have set for itself. Grad mode, default device and autocast belong to the thread.
MOODS = [
    contextlib.nullcontext,
    torch.no_grad,
    lambda: torch.device("meta"),
    lambda: torch.autocast("cpu", torch.bfloat16),
]


@pytest.fixture(autouse=True)
def nothing_global_changes() -> Iterator[None]:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    yield
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert torch.is_grad_enabled()


def together(events: list[Callable[[int], None]], check: Callable[[], None]) -> None:
    """Fire all events at once, each on its own thread and in its own mood, 200 times, and check after each time."""
    gate, failures = threading.Barrier(len(events) + 1), []

    def drive(event: Callable[[int], None], mood: Callable) -> None:
        try:
            with mood():
                for turn in range(ROUNDS):
                    gate.wait(30)
                    event(turn)
                    gate.wait(30)
        except threading.BrokenBarrierError:
            return
        except Exception as error:
            failures.append(error)
            gate.abort()

    threads = [threading.Thread(target=drive, args=(e, MOODS[n % len(MOODS)])) for n, e in enumerate(events)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(ROUNDS):
            gate.wait(30)
            gate.wait(30)
            check()
    except threading.BrokenBarrierError:
        pass
    finally:
        gate.abort()
        for thread in threads:
            thread.join()
    assert failures == []


def follows(lab) -> None:
    """Controls, state and words are those of the settings."""
    for trait, control in lab._controls.items():
        wanted = getattr(lab, trait)  # a log-prob is a float32
        assert control.value == (pytest.approx(wanted, rel=1e-6) if isinstance(wanted, float) else wanted), trait
    assert lab._state_box.value == lab.state
    assert lab._complaint.value == ""


def step_is_right(lab) -> None:
    follows(lab)
    chain, tokens = find(lab, StageChain)[0], find(lab, TokenMask)[0]
    torch.testing.assert_close(lab.gradient, expected_gradient(lab), rtol=1e-6, atol=0)
    masked_sum = (torch.tensor(lab.log_probs) * torch.tensor(lab.mask)).sum().item()
    values = {stage["name"]: stage["value"] for stage in chain.stages}
    assert values["masked_sum"] == fixed(masked_sum / lab.normalize_constant)
    assert values["returned_loss"] == fixed(lab.loss)
    assert lab.loss == pytest.approx(float((lab.gradient * torch.tensor(lab.log_probs)).sum()), rel=1e-5)
    assert tokens.mask == lab.mask
    assert torch.tensor(tokens.values).equal(lab.gradient)
    assert (chain.words, chain.drawn) == (lab.words(), lab._drawn)


@cache
def expected(steps: int, rule: str, imbalance: float) -> list:
    """How the gradient after each microbatch compares with the full batch: no lab has a hand in this."""
    model = TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=256).double()
    batch = ragged_minibatch(8, imbalance)
    reference = full_batch_gradient(model, batch)
    running = accumulate(model, split_minibatch(batch, steps), rule=rule, keep_running=True).running
    return [compare(gradient, reference) for gradient in (torch.zeros_like(reference), *running)]


def accumulation_is_right(lab) -> None:
    follows(lab)
    right = expected(lab.gradient_accumulation_steps, lab.rule, lab.imbalance)[lab.played]
    assert (lab.ratio, lab.cosine) == pytest.approx((right.ratio, right.cosine), rel=1e-9)
    bars = find(lab, Bars)[0]
    assert (bars.rows[0]["value"], bars.words, bars.drawn) == (lab.ratio, lab.words(), lab._drawn)


def scaling_is_right(lab) -> None:
    follows(lab)
    bars = find(lab, Bars)[0]
    for row, rule in zip(bars.rows, RULES, strict=True):
        right, shown = (
            expected(lab.gradient_accumulation_steps, rule, lab.imbalance)[-1],
            lab.results[rule]["comparison"],
        )
        assert (shown.ratio, shown.cosine) == pytest.approx((right.ratio, right.cosine), rel=1e-9)
        assert (row["label"], row["value"]) == (rule, shown.ratio)
    assert (bars.words, bars.drawn) == (lab.words(), lab._drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eight_events_at_once_leave_a_step_lab_in_step(dtype):
    lab = StepLab()
    slider, menu = find(lab, ipywidgets.IntSlider)[0], find(lab, ipywidgets.Dropdown)[0]
    tokens = find(lab, TokenMask)[0]
    events = [
        lambda turn: setattr(slider, "value", 1 + turn % 32),
        lambda turn: setattr(lab, "gradient_accumulation_steps", 32 - turn % 32),
        lambda turn: tokens.set_state({"mask": f"{turn % 16:04b} 1111"}),
        lambda turn: setattr(lab, "mask", MASKS[turn % 4].tolist()),
        lambda turn: setattr(menu, "value", RULE_NAMES[turn % 5]),
        lambda turn: setattr(tokens, "focused", (turn % 2, turn % 4)),
        lambda turn: setattr(lab, "state", f"G={1 + turn % 7} c={1 + turn % 3} mask=1101/{turn % 16:04b}"),
        lambda turn: setattr(lab, "log_probs", [[-0.1 * (1 + turn % 9)] * 4] * 2),
    ]
    torch.set_default_dtype(dtype)  # this one belongs to all threads
    try:
        together(events, lambda: step_is_right(lab))
    finally:
        torch.set_default_dtype(torch.float32)
    assert lab.gradient.dtype == torch.float32


def test_eight_events_at_once_on_four_kinds_of_labs_that_share_a_model():
    step, mask, accumulation, scaling = StepLab(), MaskLab(["ab"], ["cd"]), AccumulationLab(), ScalingLab()
    played = accumulation._controls["played"]
    presets = [name for name in mask._presets if name != "one too early"]
    events = [
        lambda turn: setattr(step, "gradient_accumulation_steps", 1 + turn % 32),
        lambda turn: setattr(step, "rule", RULE_NAMES[turn % 5]),
        lambda turn: setattr(accumulation, "rule", RULE_NAMES[turn % 5]),
        lambda turn: setattr(played, "value", turn % 3),
        lambda turn: setattr(accumulation, "gradient_accumulation_steps", 2 + turn // 10 % 2),
        lambda turn: setattr(scaling, "gradient_accumulation_steps", 2 + turn % 2),
        lambda turn: setattr(scaling, "max_norm", 1.0 + turn % 3),
        lambda turn: setattr(mask, "preset", presets[turn % len(presets)]),
    ]
    turns = iter(range(ROUNDS))

    def check() -> None:
        step_is_right(step)
        step_is_right(mask)
        accumulation_is_right(accumulation)
        scaling_is_right(scaling)
        if next(turns) % 40 == 0:  # or most events would find what another has computed
            experiments.accumulated.cache_clear()

    experiments.accumulated.cache_clear()
    together(events, check)
