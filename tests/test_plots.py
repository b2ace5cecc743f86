"""Pictures are tested by their data: texts, colours, frames."""

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from test_token_grid import WIDGETS, contrast

import sft_edu.plots
from sft_edu.plots import BAR_FILL, INK, StepPicture, bar_figure, gradient_colour
from sft_edu.widgets.bars import COLOURS

ROLES = [["prompt", "response"], ["response", "padding"]]
STEPS = {"num_tokens": ("Σ m = 1 + 1", "2"), "loss": ("-S / G = -(-3) / 2", "1.5000")}


def texts(picture):
    return [text.get_text() for axes in picture.figure.axes for text in axes.texts]


def test_the_picture_shows_the_numbers_it_is_given():
    picture = StepPicture(ROLES)
    picture.update(STEPS, [[-0.5, -1.0], [-2.0, -4.0]], [[0, 1], [1, 0]], [[0.0, -0.25], [-0.25, 0.0]])
    shown = texts(picture)
    assert {"-0.5000", "-1.0000", "-2.0000", "-4.0000", "1.5000", "2"} <= set(shown)
    assert shown.count("-0.2500") == 2
    assert shown.count("0") == 2 + 2  # two masked gradients; and row 0 is numbered in both grids


def test_frames_follow_the_mask_and_colours_follow_the_gradient():
    picture = StepPicture(ROLES)
    picture.update(STEPS, [[-1, -1], [-1, -1]], [[0, 1], [1, 0]], [[0.0, -0.25], [0.25, 0.0]])
    gradient_axes = picture.figure.axes[2]
    cells, frames = gradient_axes.patches[0::2], gradient_axes.patches[1::2]
    assert [frame.get_edgecolor() == to_rgba(INK) for frame in frames] == [False, True, True, False]
    assert [cell.get_facecolor() for cell in cells] == [gradient_colour(g) for g in (0.0, -0.25, 0.25, 0.0)]


def test_text_can_be_read_on_every_shade_of_the_gradient():
    sizes = [10 ** (n / 4 - 5) for n in range(24)]
    values = [0.0, *sizes, *(-size for size in sizes), float("nan")]
    columns = len(values)
    picture = StepPicture([["prompt"] * columns] * 2, [["a"] * columns] * 2)
    masks = [[0] * columns, [1] * columns]
    picture.update(STEPS, [values] * 2, masks, [values] * 2)
    axes = picture.figure.axes[2]
    shades = [patch.get_facecolor() for patch in axes.patches[0::2]]
    words = [
        text for text in axes.texts if text.get_text() and text.get_position()[0] > 0 and text.get_ha() == "center"
    ]
    assert len(words) == 2 * 2 * columns  # a token and a number in each cell
    for text in words:
        x, y = text.get_position()
        shade = shades[int(y) * columns + int(x)]
        pair = [[255 * channel for channel in to_rgba(colour)[:3]] for colour in (text.get_color(), shade)]
        assert contrast(*pair) >= 4.5, (text.get_text(), text.get_color(), shade)


def test_bars_have_the_colours_of_the_page():
    style = (WIDGETS / "bars.css").read_text(encoding="utf-8")
    rules = re.findall(
        r'^\.sft-edu-bars-fill\[data-colour="(\w+)"\] {\s*background-color: (#\w+);', style, re.MULTILINE
    )
    assert dict(rules) == BAR_FILL
    assert set(BAR_FILL) == set(COLOURS)


def test_bars_are_drawn_in_their_colours_and_to_their_values():
    rows = [{"label": c, "value": 1.0 + n, "text": f"{n}x", "colour": c, "note": ""} for n, c in enumerate(COLOURS)]
    axes = bar_figure([("title", rows, 1.0)]).axes[0]
    assert [bar.get_facecolor() for bar in axes.patches] == [to_rgba(BAR_FILL[colour]) for colour in COLOURS]
    assert [bar.get_width() for bar in axes.patches] == [row["value"] for row in rows]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(COLOURS)
    assert {row["text"] for row in rows} <= {text.get_text() for text in axes.texts}


def test_an_update_changes_the_picture_in_place():
    picture = StepPicture(ROLES, [["a", "b"], ["c", "d"]])
    arguments = ([[-1, -1], [-1, -1]], [[1, 1], [1, 1]], [[-1.0, -1.0], [-1.0, -1.0]])
    picture.update(STEPS, *arguments)
    artists = [len(axes.get_children()) for axes in picture.figure.axes]
    picture.update(STEPS, *arguments)
    picture.update({"loss": ("x", "7.0000")}, *arguments)
    assert [len(axes.get_children()) for axes in picture.figure.axes] == artists
    assert "7.0000" in texts(picture)
    assert "1.5000" not in texts(picture)


def test_no_text_leaves_its_box_or_the_picture():
    columns = 21
    picture = StepPicture([["prompt"] * columns] * 2, [["<pad>"] * columns] * 2)
    steps = dict.fromkeys(("masked_sum", "loss"), ("-c·S / N = -(99.5000 · -1234.5678) / 999", "-1234.5678"))
    picture.update(steps, [[-12.34] * columns] * 2, [[1] * columns] * 2, [[-0.0001] * columns] * 2)
    renderer = FigureCanvasAgg(picture.figure).get_renderer()
    page = picture.figure.bbox
    for axes in picture.figure.axes:
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, text.get_text()
    cell = picture.figure.axes[1].patches[0].get_window_extent(renderer)
    assert all(
        text.get_window_extent(renderer).width <= cell.width
        for text in picture.figure.axes[1].texts
        if text.get_text() in ("<pad>", "-12.34")
    )


@pytest.mark.parametrize("columns", [1, 4, 6, 7, 12, 16])
def test_no_text_covers_another(columns):
    picture = StepPicture([["prompt"] * columns] * 2, [["a"] * columns] * 2)
    picture.update(STEPS, [[-1e-5] * columns] * 2, [[1] * columns] * 2, [[-1e-5] * columns] * 2)
    renderer = FigureCanvasAgg(picture.figure).get_renderer()
    words = [text for axes in picture.figure.axes for text in axes.texts if text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in words]
    assert len(boxes) > 2 * 2 * 2 * columns
    assert [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)] == []


@pytest.mark.parametrize("log", [False, True])
def test_no_text_of_the_bars_leaves_the_picture(log):
    rows = [
        {"label": "microbatch_token_mean", "value": value, "text": f"{value:.4f}x", "colour": "notes", "note": "n" * 25}
        for value in (0.0, 0.1875, 999.0)
    ]
    figure = bar_figure([("title", rows, 1.0)], log=log)
    FigureCanvasAgg(figure).draw()
    axes, page = figure.axes[0], figure.bbox
    for text in [*axes.texts, *axes.get_yticklabels(), axes.title]:
        box = text.get_window_extent()
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text.get_text()
    left = axes.get_xlim()[0]
    assert left == pytest.approx(0.01875) if log else left == 0


@pytest.mark.parametrize("gradient", [1e-9, 1e-4, 0.25, 1.0, 1e3])
def test_the_gradient_map_is_symmetric_and_only_zero_is_white(gradient):
    assert gradient_colour(0.0) == (1, 1, 1, 1)
    below, above = gradient_colour(-gradient), gradient_colour(gradient)
    assert below != (1, 1, 1, 1)
    if gradient >= 1e-4:
        assert below[0] > below[2]  # orange
        assert above[2] > above[0]  # purple


@pytest.mark.parametrize("token", ["$$", "$\\foo$", "_{", "<pad>", "<>"])
def test_a_token_is_written_as_it_is(token):
    picture = StepPicture([["prompt"]], [[token]])
    picture.update(STEPS, [[-1.0]], [[1]], [[-1e-5]])
    FigureCanvasAgg(picture.figure).draw()
    assert (token.strip("<>") or token) in texts(picture)
    assert "-1.000e-05" in texts(picture)


def test_plots_know_neither_torch_nor_pyplot():
    tree = ast.parse(Path(sft_edu.plots.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any("torch" in name or "pyplot" in name for name in imported)
