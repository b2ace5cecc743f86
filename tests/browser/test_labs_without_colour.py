"""What a lab says by colour it also says by shape, mark or word: seen where colours are forced to two."""

import io
from collections.abc import Iterator
from itertools import combinations

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Locator, expect
from test_token_grid import contrast

from sft_edu.scaling import RULES

from .lab_page import LabPage
from .labs_notebook import Labs, labs_notebook, until

# Every role in both states.
CHIPS = """
from sft_edu.widgets import TokenMask
roles = ["prompt", "response", "eos", "padding"]
chips = TokenMask([["x"] * 4] * 2, [[0] * 4, [1] * 4], labels=[roles] * 2)
mask.children = (*mask.children, chips)
"""


@pytest.fixture(scope="module")
def labs(lab: LabPage) -> Iterator[Labs]:
    with labs_notebook(lab) as open_labs:
        open_labs.page.emulate_media(forced_colors="active")
        yield open_labs
        open_labs.page.emulate_media(forced_colors="none")


def look(element: Locator) -> Image.Image:
    """Black and white, of one size."""
    element.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(element.screenshot(caret="hide"))).convert("L")
    return image.point(lambda light: 255 * (light > 127)).resize((36, 30), Image.Resampling.NEAREST)


def difference(one: Image.Image, other: Image.Image) -> int:
    return ImageChops.difference(one, other).histogram()[255]


def test_roles_and_states_of_tokens_differ_in_shape(labs: Labs):
    labs.ask("None", CHIPS)
    chips = labs.output("mask").locator(".sft-edu-mask").nth(1).locator(".sft-edu-mask-grid button")
    expect(chips).to_have_count(8)
    for face in chips.locator(".sft-edu-chip-face").all():
        face.evaluate("face => { face.style.visibility = 'hidden' }")  # bold letters alone would not do
    looks = {chip.get_attribute("aria-label"): look(chip) for chip in chips.all()}
    assert len(looks) == 8
    same = [(one, other) for one, other in combinations(looks, 2) if difference(looks[one], looks[other]) < 15]
    assert same == []
    labs.ask("None", "mask.children = mask.children[:-1]; chips.close()")


@pytest.mark.parametrize("name", ["mask", "step"])
def test_a_painted_token_and_a_chosen_step_are_marked_without_colour(labs: Labs, name: str):
    output = labs.output(name)
    for first in (
        output.locator(".sft-edu-mask-grid button").first,
        output.locator(".sft-edu-chain-box").first,
    ):
        before = look(first)
        first.click()
        labs.page.mouse.move(0, 0)
        labs.page.evaluate("() => document.activeElement.blur()")
        pressed = first.get_attribute("aria-pressed")
        after = look(first)
        assert difference(before, after) >= 15, pressed
        first.click()
        expect(first).not_to_have_attribute("aria-pressed", pressed)


@pytest.mark.parametrize("name", ["mask", "step"])
def test_the_sign_and_size_of_a_shade_are_told_in_words(labs: Labs, name: str):
    """The shade is gone here; the number is in the line below and in the name of the token."""
    output = labs.output(name)
    chips = output.locator(".sft-edu-mask-grid button")
    shades = {chip.evaluate("chip => getComputedStyle(chip).backgroundColor") for chip in chips.all()}
    assert len(shades) == 1
    for chip, (_, _, _, gradient, _) in zip(chips.all(), labs.chips(name), strict=True):
        chip.hover()
        shown = output.locator(".sft-edu-mask-readout")
        expect(shown).to_contain_text(f"gradient {gradient:.4f}" if gradient else "gradient 0")
    legend = output.locator(".sft-edu-mask-legend")
    for word in ("prompt", "response", "gradient", "mask = 1:"):
        expect(legend).to_contain_text(word)


@pytest.mark.parametrize("name", ["accumulation", "scaling", "optimizer"])
def test_each_bar_is_named_measured_and_framed(labs: Labs, name: str):
    labs.ask("None", "accumulation.played = 3")
    for panel in labs.output(name).locator(".sft-edu-bars").all():
        expect(panel.locator(".sft-edu-bars-fill[data-empty=true]")).to_have_count(0)
        rows = panel.get_by_role("row").all()
        labels = [row.locator(".sft-edu-bars-label").inner_text() for row in rows]
        assert len(set(labels)) == len(rows) >= 2
        for row in rows:
            assert row.get_by_role("cell").inner_text().strip("x").replace(",", "").replace(".", "").isdigit()
            fill = row.locator(".sft-edu-bars-fill")
            assert fill.evaluate("fill => getComputedStyle(fill).borderTopStyle") == "solid"
            for palette in palettes(labs):
                assert stands_out(fill, "borderTopColor"), palette
    reference = labs.output(name).locator(".sft-edu-bars-reference-label").first
    expect(reference).to_have_text("right gradient" if name == "optimizer" else "full batch")


def test_the_colour_of_a_rule_comes_with_its_name(labs: Labs):
    scaling, accumulation = labs.output("scaling"), labs.output("accumulation")
    for row in scaling.locator(".sft-edu-bars-row").all():
        rule = row.locator(".sft-edu-bars-fill").get_attribute("data-colour")
        assert rule in RULES
        expect(row.locator(".sft-edu-bars-label")).to_have_text(rule)
    for rule in RULES:
        accumulation.locator("select").select_option(rule)
        fill = accumulation.locator(".sft-edu-bars-fill").first
        until(lambda rule=rule, fill=fill: fill.get_attribute("data-colour") == rule, lambda rule=rule: rule)
        expect(accumulation.locator("select")).to_have_value(rule)


@pytest.mark.parametrize("name", ["accumulation", "scaling", "optimizer"])
def test_the_marked_line_stands_out_from_the_page(labs: Labs, name: str):
    line = labs.output(name).locator(".sft-edu-bars-reference").first
    assert line.evaluate("line => getComputedStyle(line).borderLeftStyle") == "dashed"
    for palette in palettes(labs):
        assert stands_out(line, "borderLeftColor"), palette


def palettes(labs: Labs) -> Iterator[str]:
    """The two colours that a reader may have forced: dark on light, light on dark."""
    for palette in ("dark", "light"):
        labs.page.emulate_media(forced_colors="active", color_scheme=palette)
        yield palette


def stands_out(element: Locator, part: str) -> bool:
    colours = element.evaluate(
        """(element, part) => [getComputedStyle(element)[part], getComputedStyle(document.body).backgroundColor]
          .map(colour => colour.match(/[\\d.]+/g).map(Number).slice(0, 3))""",
        part,
    )
    return contrast(*colours) >= 3
