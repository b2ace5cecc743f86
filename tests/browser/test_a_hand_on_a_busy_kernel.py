"""Labs under a hand while a cell runs that has changed grad mode, default device and dtype, and draws random numbers.

A lab answers at once, on another thread, or after the cell, on its thread: versions of ipykernel differ, and both must
be right.
"""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, expect
from test_labs_under_threads import expected

from sft_edu import get_response_log_probs, saved_bytes, split_minibatch
from sft_edu.digits import fixed
from sft_edu.model import TinyLM
from sft_edu.ragged import ragged_minibatch
from sft_edu.scaling import RULES

from .lab_page import SECONDS, LabPage
from .labs_notebook import Labs, labs_notebook

BUSY = """
import time, torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
torch.manual_seed(7)
torch.set_grad_enabled(False)
draws = [torch.rand(2, device="cpu")]
drawn, end = scaling._drawn, time.monotonic() + seconds
while time.monotonic() < end and scaling._drawn == drawn:
    sum(range(1000))
answered_meanwhile = scaling._drawn > drawn
draws.append(torch.rand(2, device="cpu"))
was_grad, was_device = torch.is_grad_enabled(), torch.get_default_device().type
"""
AFTERWARDS = """
torch.set_default_device(None)
torch.set_default_dtype(torch.float32)
torch.set_grad_enabled(True)
torch.manual_seed(7)
undisturbed = [torch.rand(2, dtype=torch.float64) for _ in range(2)]
"""


# ipykernel 7.4 sends a message of a widget to the thread that made the widget; this is what the versions before it do.
TO_ITS_OWN_THREAD = """
import ipykernel.comm.comm
ipykernel.comm.comm.BaseComm._reply_subshell_for = lambda comm, data, wanted: wanted
"""


@pytest.fixture(scope="module", params=["perCommTarget", "disabled"])
def labs(lab: LabPage, request: pytest.FixtureRequest) -> Iterator[Labs]:
    """With a thread for the messages of widgets and without."""
    with labs_notebook(lab, request.param) as open_labs:
        open_labs.ask("None", TO_ITS_OWN_THREAD)
        yield open_labs


def start(labs: Labs, source: str) -> None:
    """Run code in a new cell, and do not wait for it."""
    labs.page.evaluate(
        """async source => {
          const { commands, shell } = window.jupyterapp;
          await commands.execute('notebook:insert-cell-below');
          shell.currentWidget.content.activeCell.model.sharedModel.setSource(source);
          commands.execute('notebook:run-cell');
        }""",
        source,
    )
    expect(prompt(labs)).to_have_text("[*]:")


def prompt(labs: Labs) -> Locator:
    """Of the last cell. The kernel's own status is no help: a thread that has answered a lab calls it idle."""
    return labs.page.locator(".jp-CodeCell .jp-InputPrompt").last


def press(labs: Labs, name: str, role: str, label: str, *keys: str) -> None:
    control = labs.output(name).get_by_role(role, name=re.compile(label)).first
    control.scroll_into_view_if_needed()
    control.focus()
    for key in keys:
        labs.page.keyboard.press(key)


def test_a_hand_gets_the_right_numbers_while_a_cell_is_busy(labs: Labs):
    waits = labs.threads == "disabled"
    start(labs, f"seconds = {5 if waits else 60}\n{BUSY.strip()}")
    press(labs, "step", "slider", "^G$", "ArrowRight", "ArrowRight", "ArrowRight")
    press(labs, "step", "button", "^sequence 0, token 2", "Space")
    press(labs, "mask", "combobox", "mask", "ArrowDown")
    press(labs, "accumulation", "slider", "sequences", "ArrowRight", "ArrowRight", "ArrowRight")
    press(labs, "accumulation", "slider", "played", "End")
    press(labs, "scaling", "slider", "imbalance", "ArrowRight")
    expect(prompt(labs)).not_to_have_text("[*]:", timeout=70 * SECONDS)
    labs.settle("(step.gradient_accumulation_steps, step.num_tokens)", (5, 8))
    labs.settle("(accumulation.num_sequences, accumulation.played)", (11, 4))
    labs.settle("scaling.imbalance", 0.6)

    assert labs.ask("(was_grad, was_device)", AFTERWARDS) == (False, "meta")
    assert labs.ask("answered_meanwhile") != waits
    assert labs.ask("[torch.equal(*pair) for pair in zip(draws, undisturbed)]") == [True, True]
    for name in ("step", "mask", "accumulation", "scaling"):
        labs.agree(name)
    text = labs.ask("repr(step)")
    assert "loss 0.7200, scaled_loss 0.1440, gradient -0.0400 where" in " ".join(text.split())
    assert labs.ask("(mask.preset, mask.num_tokens)") == ("prompt leaked in", 6)
    assert_filled(labs.ask("repr(accumulation)"))
    for rule in RULES:
        right = expected(4, rule, 0.6)[-1]
        assert re.search(
            rf"{rule} +{RULES[rule].formula} +{fixed(right.ratio)}x +{right.cosine:.4f}", labs.ask("repr(scaling)")
        )


def assert_filled(text: str) -> None:
    """Eleven sequences in four microbatches, all of them played."""
    model = TinyLM(d_model=16, num_layers=1, num_heads=2, context_length=256).double()
    batch = ragged_minibatch(11, 0.5)
    held = [
        saved_bytes(lambda part=part: get_response_log_probs(model, part["input_ids"], part["labels"]), model, part)
        for part in (split_minibatch(batch, steps)[0] for steps in (4, 1))
    ]
    assert "sequences=11 G=4 rule=token_mean imbalance=0.5 played=4" in text
    assert "length 1.0000x, cosine 1.0000" in text
    assert f"{held[0] / held[1]:.2f} of what the full batch holds" in text
