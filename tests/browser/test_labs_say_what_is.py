"""After every change a lab's page says the kernel's numbers to those who cannot see the picture."""

from collections.abc import Iterator

import pytest

from .lab_page import LabPage
from .labs_notebook import Labs, labs_notebook

CHANGES = {
    "mask": ["mask.preset = 'one too late'", "mask.mask = [[1, 0, 1, 0, 1, 0]]", "mask.preset = 'all masked'"],
    "step": [
        "step.gradient_accumulation_steps = 32; step.normalize_constant = 100",
        "step.rule = 'token_mean'",
        "step.mask = [[0, 1, 1, 0], [1, 0, 0, 0]]",
        "step.log_probs = [[-1.0, -2.0, -3.0, -4.0]] * 2",
        "step.mask = [[0] * 4] * 2",
        "step.reset()",
    ],
    "accumulation": [
        "accumulation.played = 2",
        "accumulation.rule = 'notes'",
        "accumulation.gradient_accumulation_steps = 3",
        "accumulation.num_sequences, accumulation.imbalance = 13, 1.0",
        "accumulation.played = 3",
        "accumulation.state = 'sequences=8 G=1 rule=token_mean imbalance=0 played=1'",
        "accumulation.reset()",
    ],
    "optimizer": [
        "optimizer.optimizer_steps = 30",
        "optimizer.bug = 'no_minus'",
        "optimizer.gradient_accumulation_steps, optimizer.bug = 2, 'mean_of_means'",
        "optimizer.eps, optimizer.max_norm = 1e-3, 2.5",
        "optimizer.reset()",
    ],
    "ranks": [
        "ranks.world_size = 7",
        "ranks.denominator = 'global'",
        "ranks.num_sequences, ranks.skew = 8, 0.3",
        "ranks.state = 'W=64 sequences=32 skew=1 denominator=global_over_world'",
        "ranks.reset()",
    ],
    "scaling": [
        "scaling.gradient_accumulation_steps = 3",
        "scaling.imbalance = 0.0",
        "scaling.max_norm = 20.0",
        "scaling.state = 'G=8 imbalance=1'",
    ],
}


@pytest.fixture(scope="module")
def labs(lab: LabPage) -> Iterator[Labs]:
    with labs_notebook(lab) as open_labs:
        yield open_labs


@pytest.mark.parametrize("name", CHANGES)
def test_the_page_says_what_the_kernel_says_after_every_change_and_nothing_jumps(labs: Labs, name: str):
    labs.agree(name)
    said = labs.ask(f"repr({name})")
    labs.output(name).evaluate("output => output.scrollIntoView()")
    labs.lab.watch_jumps()
    for change in CHANGES[name]:
        labs.ask("None", change)
        labs.agree(name)
        assert labs.lab.jumps() == [], change
        assert labs.ask(f"repr({name})") != said, change
        said = labs.ask(f"repr({name})")


def test_a_hand_that_paints_and_drags_is_followed_in_words(labs: Labs):
    output = labs.output("mask")
    output.scroll_into_view_if_needed()
    output.locator("select").select_option("prompt leaked in")
    labs.settle("mask.num_tokens", 6)
    labs.agree("mask")
    first, last = (output.locator(".sft-edu-mask-grid button").nth(index).bounding_box() for index in (0, 2))
    labs.page.mouse.move(first["x"] + 9, first["y"] + 9)
    labs.page.mouse.down()
    labs.page.mouse.move(last["x"] + 9, last["y"] + 9, steps=4)
    labs.page.mouse.up()
    labs.settle("mask.mask", ((0, 0, 0, 1, 1, 1),))
    labs.agree("mask")

    slider = labs.output("accumulation").get_by_role("slider", name="played")
    slider.hover()
    handle = slider.bounding_box()
    labs.page.mouse.down()
    labs.page.mouse.move(handle["x"] + 400, handle["y"] + 5, steps=6)
    labs.page.mouse.up()
    labs.settle("accumulation.played", 4)
    labs.agree("accumulation")
