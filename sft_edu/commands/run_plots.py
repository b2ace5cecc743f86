"""The curves of a run: lines of its metrics in, matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sft_edu.plots import FAINT, INK, LINE

_LIGHT = {"ink": INK, "faint": FAINT, "line": LINE, "first": "#0072b2", "second": "#b35806"}
_DARK = {"ink": "#e6e8eb", "faint": "#a9b1ba", "line": "#4a515a", "first": "#56b4e9", "second": "#fdb863"}
_STEEP = 20  # the largest value over the smallest, from which on an axis is logarithmic

Lines = Sequence[Mapping[str, object]]


def run_figure(lines: Lines, *, dark: bool = False, columns: int = 2) -> Figure:
    """What each optimizer step of a run measured, in four panels; those of held-out examples have dots.

    Args:
        lines: of `metrics.jsonl`.
        dark: for a dark page. The background is transparent either way.
        columns: of panels: 2, or 1 for a narrow page.
    """
    look = _DARK if dark else _LIGHT
    rows = 4 // columns
    figure = Figure(figsize=(4.8 * columns, 2.8 * rows), facecolor="none", layout="constrained")
    figure.get_layout_engine().set(hspace=0.09, wspace=0.05)
    loss, answers, gradient, rate = figure.subplots(rows, columns).flat
    _draw(loss, "NLL per response token, nats", lines, {"nll": "training", "held_out_nll": "held out"}, look)
    if any("held_out_exact_match" in line for line in lines):
        _draw(answers, "held-out answers that are right", lines, {"held_out_exact_match": ""}, look)
        answers.set(ylim=(-0.04, 1.04))
        answers.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        _draw(answers, "entropy of a prediction, nats", lines, {"entropy": "training"}, look)
    norms = {"grad_norm": "before clipping", "clipped_norm": "after clipping"}
    _draw(gradient, "length of the gradient", lines, norms, look)
    _draw(rate, "learning rate", lines, {"learning_rate": ""}, look)
    rate.set_ylim(bottom=0)
    return figure


def _draw(axes: Axes, title: str, lines: Lines, columns: Mapping[str, str], look: Mapping[str, str]) -> None:
    steep = []
    for index, (column, label) in enumerate(columns.items()):
        colour = "second" if index or "held_out" in column else "first"
        points = [(line["step"], line[column]) for line in lines if line.get(column) is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        # Not by colour alone: what is held out has dots, what is clipped has dashes.
        dots = {"marker": "o", "markersize": 4} if "held_out" in column else {}
        dashes = {"linestyle": "--"} if column == "clipped_norm" else {}
        dots |= {"marker": "o", "markersize": 4} if len(points) == 1 else {}
        axes.plot(steps, values, label=label, color=look[colour], linewidth=1.3, **dots, **dashes)
        steep += [value for value in values if value > 0]
    is_log = "rate" not in title and "answers" not in title and steep and max(steep) > _STEEP * min(steep)
    axes.set_yscale("log" if is_log else "linear")
    axes.set_title(title + ", logarithmic" * bool(is_log), loc="left", fontsize=10, color=look["ink"])
    axes.set_xlabel("optimizer step", fontsize=8.5, color=look["faint"])
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set_facecolor("none")
    axes.tick_params(labelsize=8.5, labelcolor=look["faint"], color=look["line"], which="both")
    axes.grid(color=look["line"], linewidth=0.5, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(look["line"])
    if len(columns) > 1:
        axes.legend(fontsize=8.5, frameon=False, labelcolor=look["ink"])
