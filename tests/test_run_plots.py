"""The curves of a run, tested by their data."""

import math

import pytest

from sft_edu.commands.run_plots import run_figure


def lines(count: int, *, scored: bool = True) -> list[dict[str, object]]:
    return [
        {"step": step, "nll": 3.0 / step, "grad_norm": 2.0 / step, "clipped_norm": min(2.0 / step, 1.0), "entropy": 1.0}
        | {"learning_rate": 0.1 * step}
        | ({"held_out_exact_match": step / count, "held_out_nll": 4.0 / step} if scored and step % 2 else {})
        for step in range(1, count + 1)
    ]


def drawn(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of a panel -> label -> points."""
    return {
        axes.get_title(loc="left"): {
            one.get_label(): [tuple(map(float, point)) for point in one.get_xydata()] for one in axes.lines
        }
        for axes in figure.axes
    }


def test_every_number_is_where_it_belongs():
    panels = drawn(run_figure(lines(5)))
    loss, answers, gradient, rate = panels.values()
    assert loss["training"] == [(step, 3.0 / step) for step in range(1, 6)]
    assert loss["held out"] == [(step, 4.0 / step) for step in (1, 3, 5)]
    assert list(answers.values()) == [[(step, step / 5) for step in (1, 3, 5)]]
    assert gradient["before clipping"][0] == (1, 2.0)
    assert gradient["after clipping"][0] == (1, 1.0)
    assert list(rate.values()) == [[(step, pytest.approx(0.1 * step)) for step in range(1, 6)]]


def test_without_held_out_examples_there_is_the_entropy():
    figure = run_figure(lines(5, scored=False))
    assert list(drawn(figure))[1] == "entropy of a prediction, nats"


def test_steep_curves_are_logarithmic_and_say_so():
    assert next(iter(drawn(run_figure(lines(5))))) == "NLL per response token, nats"
    figure = run_figure(lines(50))
    assert next(iter(drawn(figure))) == "NLL per response token, nats, logarithmic"
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "log", "linear"]


def test_what_is_no_number_leaves_a_gap():
    with_gap = lines(3)
    with_gap[1]["nll"] = None
    assert [x for x, _ in drawn(run_figure(with_gap))["NLL per response token, nats"]["training"]] == [1, 3]


def test_lines_are_told_apart_without_colour():
    loss, _, gradient, _ = run_figure(lines(5)).axes
    assert [one.get_marker() for one in loss.lines] == ["None", "o"]
    assert [one.get_linestyle() for one in gradient.lines] == ["-", "--"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 1000])
def test_steps_are_counted_in_integers(count: int):
    for axes in run_figure(lines(count)).axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


def test_panels_are_as_large_in_one_column_as_in_two():
    two, one = run_figure(lines(5)), run_figure(lines(5), columns=1)
    assert one.get_size_inches().tolist() == [two.get_size_inches()[0] / 2, two.get_size_inches()[1] * 2]
    assert len({axes.get_subplotspec().colspan.start for axes in one.axes}) == 1
    assert drawn(one) == drawn(two)


@pytest.mark.parametrize("dark", [False, True])
def test_one_step_is_a_dot_and_both_themes_draw(dark: bool):
    figure = run_figure(lines(1), dark=dark)
    assert all(one.get_marker() == "o" for axes in figure.axes for one in axes.lines)
    assert figure.get_facecolor()[3] == 0
    figure.draw_without_rendering()
    assert not any(math.isnan(limit) for axes in figure.axes for limit in (*axes.get_xlim(), *axes.get_ylim()))
