"""Each incident: the broken loop fails its audit in the way that is told, and the fixed one passes."""

import inspect

import pytest
import torch

from sft_edu import broken_steps
from sft_edu.audit import audit_step
from sft_edu.incidents import INCIDENTS, gradient_left
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch

PROBLEMS = {
    "mean of means": ("depends-on-split",),
    "dropped mask": ("mask-ignored", "padding-counted"),
    "partial window": ("depends-on-split", "partial-window"),
    "zeroed gradients": ("sequences-missing", "depends-on-split"),
}
OBJECTIVES = {"partial window": "sequence_mean"}
STEPS = {
    "without_a_graph": (None, ("no-backward",)),
    "backward_twice": (None, ("value-mismatch",)),
    "logs_with_graph": ("notes", ("metadata-attached",)),
    "mask_counts_only": ("notes", ("mask-ignored",)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_broken_loop_fails_and_the_fixed_one_passes(name: str):
    incident = INCIDENTS[name]
    broken, fixed = incident.audit(incident.broken), incident.audit(incident.fixed)
    assert broken.problems == PROBLEMS[name]
    assert fixed.ok, fixed
    assert fixed.objective == OBJECTIVES.get(name, "token_mean")


def test_eos_is_lost_with_the_padding():
    incident = INCIDENTS["endless answers"]
    broken, fixed = incident.audit(incident.broken), incident.audit(incident.fixed)
    assert not broken.ok
    assert repr(broken) == "eos is supervised in 0 of 3 responses."
    assert fixed.ok
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0]])  # eos in the middle is text, and the last one is padding
    assert incident.fixed(tokens, torch.tensor([1]), 0).int().tolist() == [[0, 1, 1, 1, 1, 0]]


def test_they_are_short_enough_to_read():
    for incident in INCIDENTS.values():
        for loop in (incident.broken, incident.fixed):
            assert len(inspect.getsource(loop).splitlines()) <= 12
        assert incident.source.startswith("https://")


@pytest.mark.parametrize("name", STEPS)
def test_a_broken_step_has_its_one_mistake(name: str):
    audit = audit_step(getattr(broken_steps, name))
    assert (audit.rule, audit.problems) == STEPS[name]


def test_the_gradient_of_a_loop_leaves_the_model_alone():
    model, minibatch = TinyLM(d_model=16, num_layers=1, num_heads=2).double(), ragged_minibatch(4, imbalance=1.0)
    first = gradient_left(INCIDENTS["mean of means"].fixed, model, [minibatch])
    assert torch.equal(gradient_left(INCIDENTS["mean of means"].fixed, model, [minibatch]), first)
    assert all(parameter.grad is None for parameter in model.parameters())
