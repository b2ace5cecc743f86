"""Traffic and memory per rank: the formulas, and their picture."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sft_edu.plots import Growth, GrowthPanel, growth_figure
from sft_edu.ranks.costs import all_reduce_bytes, ddp_traffic, fsdp_traffic, state_bytes
from sft_edu.ranks.real import EngineCosts, RealRanks
from sft_edu.widgets.rank_costs_view import show_rank_costs


def ring_all_reduce(world_size, payload):
    """Bytes into each rank, by playing the ring: W - 1 rounds that add up, W - 1 rounds that hand out."""
    received = [0.0] * world_size
    for _ in range(2 * (world_size - 1)):
        for rank in range(world_size):
            received[rank] += payload / world_size  # a chunk from the neighbour
    return received


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_an_all_reduce_moves_what_a_ring_moves(world_size):
    assert ring_all_reduce(world_size, 960.0) == pytest.approx([all_reduce_bytes(960, world_size)] * world_size)


def test_traffic_in_known_cases():
    assert [ddp_traffic(1000, world) for world in (1, 2, 4)] == [0, 1000, 1500]
    assert [fsdp_traffic(1000, 2, g) for g in (1, 2, 4)] == [1500, 2500, 4500]
    assert fsdp_traffic(1000, 2, 1, scatters_by_all_reduce=True) == 2000
    assert fsdp_traffic(1000, 1000) / ddp_traffic(1000, 1000) == pytest.approx(1.5)  # ZeRO, section 7


def test_states_in_known_cases():
    assert state_bytes(7.5e9, 1, sharded=False, per_parameter=16) == 120e9  # ZeRO, figure 1
    assert state_bytes(7.5e9, 64, sharded=True, per_parameter=16) == pytest.approx(1.9e9, rel=0.02)  # likewise
    assert state_bytes(7.5e9, 64, sharded=False, per_parameter=16) == 120e9


@pytest.mark.parametrize("formula", [all_reduce_bytes, ddp_traffic, fsdp_traffic])
def test_no_ranks_are_refused(formula):
    with pytest.raises(ValueError, match="world_size: got 0"):
        formula(1000, 0)
    with pytest.raises(ValueError, match="world_size: got 0"):
        state_bytes(1000, 0, sharded=True, per_parameter=4)


REAL = RealRanks(2, {}, {}, 1, 1000, EngineCosts(1004, 4000, 0.1), EngineCosts(3040, 2004, 0.1))


def test_the_words_set_what_was_measured_beside_the_formula():
    lines = show_rank_costs(REAL, 1000, 2).alt.splitlines()
    assert lines[1].split() == ["engine", "received", "formula", "states", "formula"]
    assert lines[2].split() == ["DDP", "1.0", "1.0", "4.0", "4.0"]
    assert lines[3].split() == ["FSDP", "3.0", "3.0", "2.0", "2.0"]


def test_where_the_system_does_not_tell_there_is_no_mark():
    unknown = RealRanks(2, {}, {}, 1, 1000, EngineCosts(None, 4000, 0.1), EngineCosts(None, 2000, 0.1))
    view = show_rank_costs(unknown, 1000, 2)
    assert view.alt.count("not told") == 2
    assert view.png.startswith(b"\x89PNG")


def test_curves_and_marks_are_drawn_where_their_numbers_are():
    curves = [
        Growth("line", [1, 2, 4], [0.0, 1.0, 1.5], "#000000"),
        Growth("mark", [2], [1.25], "#ff0000", False, True),
    ]
    figure = growth_figure([GrowthPanel("one", "x", curves, [1, 2, 4]), GrowthPanel("two", "x", curves[:1], [1, 4])])
    axes, other = figure.axes
    line, mark = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 4], [0.0, 1.0, 1.5])
    assert (line.get_marker(), mark.get_marker(), mark.get_linestyle()) == ("None", "o", "None")
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["line", "mark"]
    assert len(other.lines) == 1


def test_no_text_leaves_the_picture_or_covers_a_curve():
    curves = [Growth(f"a curve with a long name {n}", [1, 64], [n, n + 1], "#000000") for n in range(5)]
    figure = growth_figure([GrowthPanel("a title of some length, in P", "ranks W", curves, [1, 2, 64])] * 3)
    FigureCanvasAgg(figure).draw()
    page = figure.bbox
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y1 < axes.bbox.y0
        for box in (legend, axes.title.get_window_extent(), *(t.get_window_extent() for t in axes.get_xticklabels())):
            assert page.y0 <= box.y0 <= box.y1 <= page.y1
