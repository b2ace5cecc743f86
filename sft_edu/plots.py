"""Pictures of a step: numbers in, matplotlib Figure out.

Nothing here knows torch or pyplot. A picture is built once and then updated in place, because drawing a new figure for
every move of a slider flickers and fills the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from sft_edu.digits import fixed

INK, FAINT, LINE = "#1b1f24", "#5d646d", "#c9ced6"
ROLE_FILL = {"response": "#cfe2f3", "prompt": "#eceef1", "padding": "#ffffff"}
ROLE_HATCH = {"response": "", "prompt": "", "padding": "....."}
# Of a bar: the roles, and okabe_ito for the rules. bars.css has the same.
BAR_FILL = ROLE_FILL | {
    "neutral": "#8b939c",
    "gradient": "#fdb863",
    "notes": "#d55e00",
    "microbatch_mean": "#cc79a7",
    "sequence_mean": "#0072b2",
    "microbatch_token_mean": "#e69f00",
    "token_mean": "#009e73",
}
# Of a line: the rules as above, and those that are told by their dashes too. curves.css has the same.
LINE_LOOK = {
    **{name: {"color": BAR_FILL[name], "linewidth": 1.8} for name in BAR_FILL},
    "gradient": {"color": "#b35806", "linewidth": 1.8},
    "held_out": {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))},
    "clipped": {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3))},
    "before": {"color": "#8b939c", "linewidth": 1.4, "linestyle": ":"},
}

_WIDTH, _CHAIN, _TITLE, _ROW, _ROW_WITH_TOKEN = 8.8, 1.15, 0.3, 0.36, 0.5  # inches
_CENTRED = {"ha": "center", "va": "center"}
_ROUND = "round,pad=0,rounding_size=0.05"
_GRADIENT_NORM = SymLogNorm(linthresh=1e-4, vmin=-1, vmax=1, clip=True)

Matrix = Sequence[Sequence[float]]


class StepPicture:
    """One microbatch step: the six steps as a chain, the log-probs with their mask, the gradient below them.

    Args:
        roles: B rows of T names, `prompt`, `response` or `padding`: the tint of each token.
        tokens: B rows of T short texts, or None: positions are numbered then.
    """

    def __init__(self, roles: Sequence[Sequence[str]], tokens: Sequence[Sequence[str]] | None = None) -> None:
        rows, columns = len(roles), len(roles[0])
        side_by_side = columns <= 6
        grid = _TITLE + rows * (_ROW_WITH_TOKEN if tokens else _ROW)
        height = _CHAIN + grid + 0.15 + (0 if side_by_side else grid + 0.1)
        self.figure = Figure(figsize=(_WIDTH, height), facecolor="white")

        def place(left: float, top: float, across: float, down: float) -> Axes:
            """Axes at a place counted in inches from the upper left corner."""
            return self.figure.add_axes((left / _WIDTH, 1 - (top + down) / height, across / _WIDTH, down / height))

        title = "policy_log_probs; a dark frame marks mask = 1"
        if tokens:
            title += (";\n" if side_by_side else "; ") + "blue response, grey prompt, dotted padding"
        width = (_WIDTH - 0.3) / 2 if side_by_side else _WIDTH
        self._chain = _Chain(place(0, 0.05, _WIDTH, _CHAIN - 0.1))
        self._log_probs = _Cells(place(0, _CHAIN, width, grid), roles, tokens, title)
        second = (_WIDTH - width, _CHAIN) if side_by_side else (0, _CHAIN + grid + 0.1)
        self._gradient = _Cells(
            place(*second, width, grid), roles, tokens, "gradient of scaled_loss with respect to policy_log_probs"
        )

    def update(self, steps: Mapping[str, tuple[str, str]], log_probs: Matrix, mask: Matrix, gradient: Matrix) -> None:
        """Show other numbers.

        Args:
            steps: name of a step to its formula and its value, both as text, in order.
            log_probs: `[B, T]`.
            mask: `[B, T]`, 0 or 1.
            gradient: `[B, T]`.
        """
        self._chain.update(steps)
        self._log_probs.update(log_probs, mask)
        self._gradient.update(gradient, mask, gradient_colour)


def gradient_colour(gradient: float) -> tuple[float, float, float, float]:
    """White for exactly 0 and for NaN, orange below, purple above; logarithmic, because G divides twice."""
    if gradient == 0 or math.isnan(gradient):
        return (1, 1, 1, 1)
    # The outer ends of PuOr are too dark to tell their colours apart.
    return colormaps["PuOr"](0.5 + 0.32 * (2 * float(_GRADIENT_NORM(gradient)) - 1))


def ink_on(shade: tuple[float, float, float, float]) -> str:
    """Black or white, whichever can be read better on a shade; the page has the same function."""
    red, green, blue = (((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in shade[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


class _Chain:
    """The six steps as boxes from left to right."""

    NAMES = ("num_tokens", "masked_sum", "loss", "scaled_loss", "backward", "returned_loss")

    def __init__(self, axes: Axes) -> None:
        axes.set(xlim=(0, 6), ylim=(0, 1))
        axes.axis("off")
        self._formula, self._value = {}, {}
        for index, name in enumerate(self.NAMES):
            left, centre = index + 0.03, index + 0.47
            axes.add_patch(
                FancyBboxPatch((left, 0.08), 0.86, 0.84, boxstyle=_ROUND, facecolor="#f7f8fa", edgecolor=LINE)
            )
            axes.text(centre, 0.78, f"{index + 1}  {name}", ha="center", va="center", fontsize=9, color=INK)
            self._formula[name] = axes.text(centre, 0.54, "", fontsize=7.5, color=FAINT, **_CENTRED)
            self._value[name] = axes.text(
                centre, 0.25, "", ha="center", va="center", fontsize=10.5, color=INK, weight="bold"
            )
            if index:
                axes.annotate(
                    "", (left, 0.5), (left - 0.14, 0.5), arrowprops={"arrowstyle": "-|>", "color": FAINT, "lw": 1}
                )

    def update(self, steps: Mapping[str, tuple[str, str]]) -> None:
        for name, (formula, value) in steps.items():
            self._formula[name].set_text(formula.replace(" = ", "\n= "))
            self._value[name].set_text(value)


class _Cells:
    """A B x T grid of numbers, with the token above each number."""

    def __init__(self, axes: Axes, roles: Sequence[Sequence[str]], tokens: Any, title: str) -> None:
        rows, columns = len(roles), len(roles[0])
        width, height = axes.figure.get_size_inches() * axes.get_position().size
        margin = 0.3 / (width - 0.3) * columns  # room for the row numbers
        row_height = (height - _TITLE) / rows
        axes.set(xlim=(-margin, columns), ylim=(rows, -_TITLE / row_height))
        axes.axis("off")
        axes.text(0.04, -0.14 / row_height, title, va="center", fontsize=7.5 if "\n" in title else 9, color=INK)
        self._digits = 4 if columns <= 12 else 2
        longest = 6.1 if columns <= 12 else 4.5  # -1.000e-05 or -1.0e-05, in sizes of the font
        size = min(10, 72 * 0.92 * (width - 0.3) / columns / longest)
        self._roles, self._patches, self._frames, self._numbers, self._tokens = roles, [], [], [], []
        for row in range(rows):
            axes.text(-margin / 3, row + 0.5, str(row), ha="right", va="center", fontsize=9, color=FAINT)
            for column in range(columns):
                role = roles[row][column]
                self._patches.append(_cell(axes, row, column, facecolor=ROLE_FILL[role], hatch=ROLE_HATCH[role]))
                # A patch of its own, because a hatch takes the colour of the frame and would cover the text.
                self._frames.append(_cell(axes, row, column, facecolor="none"))
                if tokens:
                    token = tokens[row][column]
                    text = token.strip("<>") or token
                    look = {"fontsize": size + 1, "parse_math": False, "color": INK, **_CENTRED}
                    self._tokens.append(axes.text(column + 0.5, row + 0.32, text, **look))
                below = row + (0.7 if tokens else 0.5)
                self._numbers.append(axes.text(column + 0.5, below, "", fontsize=size, **_CENTRED))

    def update(self, values: Matrix, mask: Matrix, colour: Any = None) -> None:
        flat_values = [value for row in values for value in row]
        flat_mask = [bool(value) for row in mask for value in row]
        flat_roles = [role for row in self._roles for role in row]
        tokens = self._tokens or [None] * len(flat_values)
        artists = zip(self._patches, self._frames, self._numbers, tokens, strict=True)
        for value, selected, role, cell in zip(flat_values, flat_mask, flat_roles, artists, strict=True):
            patch, frame, number, token = cell
            shade = colour(value) if colour else ROLE_FILL[role]
            ink = ink_on(shade) if colour and value else INK if selected else FAINT
            number.set(text=fixed(value, self._digits) if value else "0", color=ink)
            if token and colour:
                token.set_color(ink_on(shade))
            frame.set(edgecolor=INK if selected else LINE, linewidth=1.6 if selected else 0.8)
            patch.set(facecolor=shade, hatch="" if colour else ROLE_HATCH[role])


def _cell(axes: Axes, row: int, column: int, **look: object) -> Rectangle:
    cell = Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, edgecolor=LINE, **look)
    cell.set_hatch_linewidth(0.4)
    return axes.add_patch(cell)


def bar_figure(panels: Sequence[tuple[str, Sequence[Mapping], float | None]], log: bool = False) -> Figure:
    """Horizontal bars in one panel below the other.

    Args:
        panels: for each a title, rows with label, value, text, colour (a key of `BAR_FILL`) and note, and where a line
            is drawn to compare with.
        log: a logarithmic axis; values that are not positive have no bar.
    """
    heights = [0.45 + 0.34 * len(rows) for _, rows, _ in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.2), facecolor="white", layout="constrained")
    every_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, rows, reference) in zip(every_axes, panels, strict=True):
        labels = [f"{row['label']}  ({row['note']})" if row["note"] else row["label"] for row in rows]
        fills = [BAR_FILL[row["colour"]] for row in rows]
        bars = axes.barh(range(len(rows)), [row["value"] for row in rows], color=fills, edgecolor=INK, height=0.6)
        axes.bar_label(bars, [row["text"] for row in rows], padding=4, fontsize=8, color=INK)
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        if log:
            axes.set_xscale("log")
            positive = [row["value"] for row in rows if row["value"] > 0] or [1]
            axes.set_xlim(min(positive) / 10, max(positive) * 4)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.tick_params(axis="x", labelsize=8, labelcolor=FAINT)
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=1, linestyle="--")
    return figure


def curve_figure(panels: Sequence[Mapping], lines: Sequence[Mapping], end: float, x_title: str) -> Figure:
    """Lines in panels side by side, with one horizontal axis in common.

    Args:
        panels: for each title, text (printed beside the title), limits of the vertical axis and log, whether that is
            logarithmic.
        lines: each with panel (its number), label, look (a key of `LINE_LOOK`) and points, (x, y) each.
        end: the horizontal axis goes from 0 to it.
        x_title: what it measures.
    """
    figure = Figure(figsize=(_WIDTH, 2.5), facecolor="white", layout="constrained")
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for line in lines:
        x, y = zip(*line["points"], strict=True) if line["points"] else ((), ())
        style = LINE_LOOK[line["look"]] | ({"marker": "."} if len(x) == 1 else {})
        every_axes[line["panel"]].plot(x, y, label=line["label"], solid_capstyle="round", **style)
    for axes, panel in zip(every_axes, panels, strict=True):
        axes.set_yscale("log" if panel["log"] else "linear")
        axes.set(xlim=(0, end), ylim=panel["limits"])
        axes.set_title(panel["title"], loc="left", fontsize=9, color=INK)
        axes.set_title(panel["text"], loc="right", fontsize=8, color=INK)
        axes.set_xlabel(x_title, fontsize=8, color=FAINT)
        axes.tick_params(labelsize=8, labelcolor=FAINT)
        axes.grid(color="#e3e6ea", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(fontsize=7, frameon=False)
    return figure


@dataclass(frozen=True)
class Growth:
    """A named line through points, or, where `is_measured`, marks without a line."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dashed: bool = False
    is_measured: bool = False


@dataclass(frozen=True)
class GrowthPanel:
    """Curves over one pair of axes. Every tick of the x axis is named in `ticks`."""

    title: str
    x_label: str
    curves: Sequence[Growth]
    ticks: Sequence[float]
    log_y: bool = False


def growth_figure(panels: Sequence[GrowthPanel]) -> Figure:
    """Panels side by side, x logarithmic: what is computed as lines, what is measured as marks with a dark frame."""
    figure = Figure(figsize=(_WIDTH, 3.7), facecolor="white", layout="constrained")
    every_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(every_axes, panels, strict=True):
        for curve in panel.curves:
            look = {"linestyle": "--" if curve.dashed else "-", "linewidth": 1.8}
            if curve.is_measured:
                look = {"linestyle": "none", "marker": "o", "markersize": 7, "markeredgecolor": INK, "zorder": 3}
            axes.plot(curve.xs, curve.ys, label=curve.label, color=curve.colour, **look)
        axes.set_xscale("log")
        axes.set_yscale("log" if panel.log_y else "linear")
        if not panel.log_y:
            axes.set_ylim(bottom=0)
        axes.set_xticks(panel.ticks, [f"{tick:,.4g}" for tick in panel.ticks])
        axes.set_xticks([], minor=True)
        axes.set_title(panel.title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel(panel.x_label, fontsize=8, color=FAINT)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.tick_params(labelsize=8, labelcolor=FAINT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7.5, frameon=False)
    return figure
