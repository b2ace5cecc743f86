"""The page's side of TokenMask without a page: run by node, and held against the Python it must agree with."""

import re
from pathlib import Path

from sft_edu.plots import INK, ROLE_FILL, gradient_colour
from sft_edu.widgets import TokenMask

HERE = Path(__file__).parent
WIDGETS = HERE.parent / "sft_edu" / "widgets"


def grid_source():
    return (WIDGETS / "token_grid.js").read_text(encoding="utf-8")


def test_geometry_strokes_and_undo(node):
    answer = node("--test", str(HERE / "js" / "token_grid.test.mjs"))
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_two_files_are_one_module_that_renders(evaluate):
    exports = evaluate(str(TokenMask._esm), "[typeof module.default.render, typeof module.render]")
    assert exports == ["function", "undefined"]


def test_the_colours_are_those_of_the_plots(evaluate):
    sizes = [10**exponent for exponent in (-9, -6, -5, -4.5, -4, -3.5, -3, -2.2, -1, -0.60206, -0.3, 0, 2)]
    values = [0.0, *sizes, *(-size for size in sizes)]
    ours = evaluate(grid_source(), f"{values}.map(module.gradientColour)")
    # Two of the map's 256 steps: matplotlib looks a single number up in half precision.
    for value, colour in zip(values, ours, strict=True):
        theirs = gradient_colour(value)[:3]
        assert max(abs(a / 255 - b) for a, b in zip(colour, theirs, strict=True)) < 0.02, value


def test_the_ink_can_be_read_on_every_shade(evaluate):
    sizes = [10 ** (n / 40 - 5) for n in range(201)]
    values = [0.0, *sizes, *(-size for size in sizes)]
    pairs = evaluate(grid_source(), f"{values}.map(module.gradientColour).map((rgb) => [rgb, module.inkOn(rgb)])")
    assert min(contrast(shade, ink) for shade, ink in pairs) >= 4.5


def test_the_style_sheet_uses_the_colours_of_the_plots():
    style = (WIDGETS / "token_mask.css").read_text(encoding="utf-8")
    for name, colour in {"ink": INK, **ROLE_FILL}.items():
        assert re.search(rf"--sft-edu-{name}: (#\w+);", style)[1] == colour, name


def contrast(one, other):
    """WCAG 2: between 1 and 21, for colours of three channels from 0 to 255."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
