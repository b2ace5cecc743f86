"""What a hand does to the labs of the lessons, and what a reader sees before running anything."""

import re

import pytest
from playwright.sync_api import Locator, expect

from .lab_page import LabPage


def output_with(lab: LabPage, text: str) -> Locator:
    """The output of the first cell whose code holds a text."""
    return lab.page.locator(".jp-CodeCell", has_text=text).first.locator(".jp-OutputArea").first


def opened(lab: LabPage, lesson: str, text: str) -> Locator:
    lab.open(lesson)
    lab.run_all()
    return output_with(lab, text)


def calm(lab: LabPage) -> None:
    assert lab.errors() == []
    assert lab.console_errors == []
    lab.close()


def chain(output: Locator, name: str) -> Locator:
    return output.get_by_role("button", name=re.compile(rf"\b{name}\b"))


def test_the_step_lab_follows_every_control(lab: LabPage):
    output = opened(lab, "02_one_step.ipynb", "lab = StepLab()")
    expect(chain(output, "returned_loss")).to_contain_text("0.7000")

    handle = output.locator(".noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    expect(chain(output, "returned_loss")).to_contain_text("0.3111")
    expect(output).to_contain_text("-0.1111 = -1 / (c·G²), where c·G² = 9")

    output.get_by_role("button", name=re.compile("sequence 0, token 2")).click()
    expect(chain(output, "num_tokens")).to_contain_text("8")
    expect(chain(output, "masked_sum")).to_contain_text("-3.6000")
    expect(output).to_contain_text("Gradient of token [0, 2], the one in focus:")
    expect(output).to_contain_text("and autograd gave the same")
    output.locator("select").select_option("sequence_mean")
    expect(output).to_contain_text("where c·B·G = 6")
    chain(output, "masked_sum").click()
    expect(output).to_contain_text("its gradient, d scaled_loss / d masked_sum: -0.1667")

    state = output.get_by_label("state")
    expect(state).to_have_value("G=3 c=1 rule=sequence_mean mask=1111/1111")
    state.fill("G=8 c=2 rule=notes mask=1000/0000")
    state.press("Enter")
    expect(chain(output, "returned_loss")).to_contain_text("0.0039")
    output.get_by_role("button", name="reset").click()
    expect(chain(output, "returned_loss")).to_contain_text("0.7000")
    calm(lab)


def test_the_step_lab_needs_no_mouse_and_keeps_its_keys(lab: LabPage):
    output = opened(lab, "02_one_step.ipynb", "lab = StepLab()")
    cells = lab.page.locator(".jp-Cell").count()
    first = output.get_by_role("button", name=re.compile("sequence 0, token 0"))
    first.focus()
    for key in ("ArrowRight", "ArrowRight", "Space", "x", "a", "d", "d"):
        lab.page.keyboard.press(key)
    expect(chain(output, "num_tokens")).to_contain_text("8")
    lab.page.keyboard.press("Control+z")
    expect(chain(output, "num_tokens")).to_contain_text("7")
    chain(output, "num_tokens").focus()
    for key in ("ArrowRight", "ArrowRight", "Enter", "x"):
        lab.page.keyboard.press(key)
    expect(output).to_contain_text("its gradient, d scaled_loss / d loss: 0.5000")
    menu = output.locator("select")
    menu.focus()
    menu.press("x")
    menu.press("ArrowDown")
    assert lab.page.evaluate("document.activeElement.tagName") == "SELECT"
    assert lab.page.locator(".jp-Cell").count() == cells
    calm(lab)


def test_the_mask_lab_is_painted_and_the_page_does_not_move(lab: LabPage):
    output = opened(lab, "01_response_mask.ipynb", "lab = MaskLab(")
    before = output.bounding_box()["height"]
    output.locator("select").select_option("eos missing")
    expect(output).to_contain_text("Response tokens left out: <eos> <eos>")
    expect(chain(output, "num_tokens")).to_contain_text("5")
    first = output.get_by_role("button", name=re.compile("sequence 0, token 2:"))
    first.scroll_into_view_if_needed()
    start = first.bounding_box()
    end = output.get_by_role("button", name=re.compile("sequence 0, token 5:")).bounding_box()
    mouse = lab.page.mouse
    mouse.move(start["x"] + 5, start["y"] + 5)
    mouse.down()
    mouse.move(end["x"] + 5, end["y"] + 5, steps=8)
    mouse.up()
    expect(chain(output, "num_tokens")).to_contain_text("9")
    expect(output).to_contain_text("Trained though they are not response: i t a l.")
    expect(output.locator("select")).to_have_value("painted by hand")
    assert abs(output.bounding_box()["height"] - before) < 30  # a sentence may take one line more
    calm(lab)


def test_the_accumulation_lab_plays(lab: LabPage):
    output = opened(lab, "03_gradient_accumulation.ipynb", "lab = AccumulationLab()")
    first = output.get_by_role("row").first
    expect(first).to_have_accessible_name(".grad after 0 of 4 no direction yet 0.0000x")
    play = output.get_by_role("button", name="play or pause")
    play.click()
    for played in (1, 2, 3, 4):
        expect(first).to_contain_text(f".grad after {played} of 4")
    expect(first).to_contain_text("1.0000x")
    expect(output.get_by_label("state")).to_have_value("sequences=8 G=4 rule=token_mean imbalance=0.5 played=4")
    expect(output.locator(".sft-edu-words").first).to_contain_text("All 4 microbatches together give the gradient")
    expect(play.locator(".fa-play")).to_have_count(1)  # it has stopped
    play.click()  # from the start
    expect(first).to_contain_text(".grad after 1 of 4")
    output.get_by_role("button", name="stop, back to 0").click()
    expect(first).to_contain_text("no direction yet")

    handle = output.get_by_role("slider", name="played")
    handle.focus()
    handle.press("ArrowRight")
    handle.press("ArrowRight")
    expect(first).to_have_accessible_name(".grad after 2 of 4 cosine 0.8294 0.4986x")
    output.locator("select").select_option("microbatch_token_mean")
    handle.press("End")
    expect(first).to_contain_text("1.0091x")
    calm(lab)


@pytest.mark.parametrize(
    ("lesson", "text"),
    [("03_gradient_accumulation.ipynb", "lab = AccumulationLab()"), ("04_loss_scaling.ipynb", "ScalingLab()")],
)
def test_sliders_are_long_enough_to_drag_and_controls_stand_in_two_rows(lab: LabPage, lesson: str, text: str):
    output = opened(lab, lesson, text)
    output.evaluate("output => { output.style.width = '900px' }")
    tracks = [track.bounding_box()["width"] for track in output.locator(".noUi-target").all()]
    assert min(tracks) > 90
    # G is the finest: up to 32 places.
    steps = output.get_by_role("slider", name=re.compile("^G$")).locator(
        "xpath=ancestor::*[contains(@class,'noUi-target')]"
    )
    assert steps.bounding_box()["width"] >= 31 * 4.5
    controls = output.locator(".widget-hbox").first
    assert controls.bounding_box()["height"] <= (75 if "Accumulation" in text else 40)
    assert controls.evaluate("row => [...row.children].every(child => child.getBoundingClientRect().right <= 1280)")
    calm(lab)


def test_the_scaling_lab_follows_the_imbalance(lab: LabPage):
    output = opened(lab, "04_loss_scaling.ipynb", "ScalingLab()")
    expect(output).to_contain_text("With 37, 45, 31, 79 response tokens")
    ragged = output.locator(".noUi-handle").last
    ragged.focus()
    for _ in range(5):
        ragged.press("ArrowLeft")
    expect(output).to_contain_text("With 48, 48, 48, 48 response tokens")
    expect(output.locator("table")).to_contain_text("48.0000x")
    calm(lab)


def test_a_prediction_reveals_its_answer_on_demand(lab: LabPage):
    opened(lab, "00_start_here.ipynb", "Predict.")
    output = lab.page.locator(".jp-OutputArea-output", has_text="Which loss does the step return?").first
    reveal = output.get_by_role("button", name="reveal")
    expect(reveal).to_be_disabled()
    # One stop of Tab, as any group of radio buttons; arrows choose.
    question = output.get_by_role("radiogroup", name=re.compile(r"^Predict\. .* Which loss does the step return\?$"))
    expect(question.get_by_role("radio")).to_have_count(4)
    question.get_by_role("radio").first.focus()
    lab.page.keyboard.press("Tab")
    assert not question.evaluate("group => group.contains(document.activeElement)")
    output.get_by_label("0.4000").check()
    lab.page.keyboard.press("ArrowDown")
    lab.page.keyboard.press("ArrowDown")
    lab.page.wait_for_timeout(500)  # a choice that arrives after the click would take the verdict back
    lab.page.keyboard.press("Tab")
    expect(reveal).to_be_focused()
    lab.page.keyboard.press("Enter")
    expect(output).to_contain_text("You said: 1.4000. The answer is: 0.7000.")
    calm(lab)


def test_an_option_longer_than_the_cell_breaks_into_lines_of_one_option(lab: LabPage):
    output = opened(lab, "04_loss_scaling.ipynb", "the lone token weighs")
    option = output.locator(".widget-radio-box label").nth(1)
    line = option.bounding_box()["height"]
    output.evaluate("output => { output.style.maxWidth = '300px' }")
    assert line < option.bounding_box()["height"] < 2 * line
    assert option.evaluate("option => option.scrollWidth <= option.closest('.widget-vbox').clientWidth")
    calm(lab)


@pytest.mark.parametrize(
    ("lesson", "text"),
    [("02_one_step.ipynb", "lab = StepLab()"), ("04_loss_scaling.ipynb", "ScalingLab()")],
)
def test_a_lesson_shows_its_pictures_before_it_has_run(lab: LabPage, lesson: str, text: str):
    lab.open(lesson)
    stored = output_with(lab, text).locator("img")
    expect(stored).to_be_visible()
    assert stored.evaluate("image => image.naturalWidth") > 800
    lab.close()
