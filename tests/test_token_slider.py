"""The slider of one token's log-prob, and what it says to a page that can show whole steps only."""

import pytest
import torch

from sft_edu.widgets import StepLab
from sft_edu.widgets.token_slider import TokenSlider


def slider(value: float) -> TokenSlider:
    one = TokenSlider(min=-10, max=0, step=0.1)
    one.value = value
    return one


def updates(widget, monkeypatch) -> list[dict]:
    """What goes to the page from now on, without the echo of what came from there."""
    sent = []
    monkeypatch.setattr(
        widget, "_send", lambda message, buffers=None: message["method"] == "update" and sent.append(message["state"])
    )
    return sent


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.1234, -0.1), (-0.15, -0.1), (-0.75, -0.7), (-0.3, -0.3), (-12, -10), (1, 0), (-9.96, -10)]
)
def test_it_stands_on_the_step_that_the_page_shows(value, shown):
    assert slider(value).value == shown


def test_a_page_that_reports_the_step_it_was_given_changes_nothing(monkeypatch):
    one = slider(-0.1234)
    heard, sent = [], updates(one, monkeypatch)
    one.observe(heard.append, "value")
    one.set_state({"value": -0.09999999999999964})
    assert (one.value, heard, sent) == (-0.1, [], [])


def test_what_a_hand_sends_is_not_sent_back_with_other_rounding(monkeypatch):
    one = slider(-0.5)
    sent = updates(one, monkeypatch)
    one.set_state({"value": -0.5999999999999996})
    assert one.value == -0.5999999999999996
    one.value = -0.6000000238418579  # the same in float32
    assert (one.value, sent) == (-0.5999999999999996, [])
    one.value = -0.7
    assert sent == [{"value": -0.7}]


def test_a_value_travels_with_its_token(monkeypatch):
    one = slider(-0.5)
    sent = updates(one, monkeypatch)
    one.turn((1, 2), -0.3)
    one.turn((0, 0), -0.3)
    assert sent == [{"token": (1, 2), "value": -0.3}, {"token": (0, 0)}]


def test_a_lab_keeps_the_log_prob_of_a_token_that_comes_into_focus(monkeypatch):
    lab = StepLab(torch.tensor([[-0.5, -0.1234]]), torch.tensor([[1, 1]]))
    slide, state = lab._controls["focused_log_prob"], lab.state
    sent = updates(slide, monkeypatch)
    lab._token_mask.set_state({"mask": "00", "focused": [0, 1]})  # painted and touched, in one message
    assert sent == [{"token": (0, 1), "value": -0.1}]
    slide.set_state({"value": -0.09999999999999964})
    lab.gradient_accumulation_steps = 3
    assert lab.state == state.replace("G=2", "G=3").replace("mask=11", "mask=00")
    assert len(sent) == 1
