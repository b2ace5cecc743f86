"""What a hand does to the labs of the lessons, and what a reader sees before running anything."""

import re

from playwright.sync_api import Locator, expect

from .lab_page import LabPage


def output_with(lab: LabPage, text: str) -> Locator:
    """The output of the first cell whose code holds a text."""
    return lab.page.locator(".jp-CodeCell", has_text=text).first.locator(".jp-OutputArea").first


def test_the_step_lab_follows_slider_toggle_and_rule(lab: LabPage):
    lab.open("02_one_step.ipynb")
    lab.run_all()
    output = output_with(lab, "lab = StepLab()")
    picture, words = output.locator("img.sft-edu-figure"), output.locator("p").last
    expect(picture).to_have_attribute("alt", re.compile(r"gradient -0\.2500 .* c·G = 4\."))

    output.get_by_role("button", name="reset").click()
    expect(picture).to_have_attribute("alt", re.compile(r"scaled_loss 0\.7000, .* c·G² = 4\."))
    shown = picture.get_attribute("src")

    handle = output.locator(".noUi-handle")
    handle.focus()
    handle.press("ArrowRight")
    expect(picture).to_have_attribute("alt", re.compile(r"scaled_loss 0\.3111, gradient -0\.1111"))
    expect(words).to_contain_text("-0.1111 = -1 / (c·G²), where c·G² = 9")
    assert picture.get_attribute("src") != shown

    output.get_by_role("button", name="0, 2").click()
    expect(picture).to_have_attribute("alt", re.compile(r"num_tokens 8, masked_sum -3\.6000"))
    output.locator("select").select_option("sequence_mean")
    expect(words).to_contain_text("where c·B·G = 6")
    assert lab.errors() == []
    assert lab.console_errors == []
    lab.close()


def test_a_picture_that_changes_does_not_move_the_page(lab: LabPage):
    lab.open("01_response_mask.ipynb")
    lab.run_all()
    output = output_with(lab, "lab = MaskLab(")
    picture, words = output.locator("img.sft-edu-figure"), output.locator("p").last
    before = picture.bounding_box()
    output.locator("select").select_option("eos missing")
    expect(words).to_contain_text("Response tokens left out: <eos> <eos>")
    expect(picture).to_have_attribute("alt", re.compile("num_tokens 5"))
    after = picture.bounding_box()
    assert (after["width"], after["height"]) == (before["width"], before["height"])
    lab.close()


def test_a_prediction_reveals_its_answer_on_demand(lab: LabPage):
    lab.open("00_start_here.ipynb")
    lab.run_all()
    output = output_with(lab, "Which loss does the step return?")
    reveal = output.get_by_role("button", name="reveal")
    expect(reveal).to_be_disabled()
    output.get_by_label("1.4000").check()
    reveal.click()
    expect(output).to_contain_text("Not 1.4000. It is 0.7000.")
    lab.close()


def test_a_lesson_shows_its_pictures_before_it_has_run(lab: LabPage):
    lab.open("02_one_step.ipynb")
    stored = output_with(lab, "lab = StepLab()").locator("img")
    expect(stored).to_be_visible()
    assert stored.evaluate("image => image.naturalWidth") > 800
    lab.close()
