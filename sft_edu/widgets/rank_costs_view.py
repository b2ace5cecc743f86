"""What travels and what a rank holds under DDP and FSDP: curves from the formulas, marks from real processes."""

from __future__ import annotations

from matplotlib.figure import Figure

from sft_edu.plots import INK, Growth, GrowthPanel, growth_figure
from sft_edu.ranks.costs import MIXED_PRECISION_BYTES, STATES, ddp_traffic, fsdp_traffic, state_bytes
from sft_edu.ranks.real import RealRanks
from sft_edu.widgets.figure import FigureView
from sft_edu.widgets.table import text_table

_WORLDS = (1, 2, 4, 8, 16, 32, 64)
_BILLIONS = (0.1, 1, 10, 100)
_DDP, _FSDP, _GRAY = INK, "#3a9bdc", "#8b939c"
_DEVICE_GB = 80


def show_rank_costs(real: RealRanks, parameter_bytes: int, microbatches_per_rank: int) -> FigureView:
    """The curves, with what the real processes measured as marks; its text has the numbers.

    Args:
        real: what `run_ranks` returned.
        parameter_bytes: P, of the model that ran.
        microbatches_per_rank: g, that each of its ranks ran.
    """
    view = FigureView()
    view.show(
        _figure(real, parameter_bytes, microbatches_per_rank), _words(real, parameter_bytes, microbatches_per_rank)
    )
    return view


def _figure(real: RealRanks, parameter_bytes: int, g: int) -> Figure:
    world = real.world_size
    received = [
        Growth(f"{name}, measured", [world], [costs.received / parameter_bytes], colour, is_measured=True)
        for name, costs, colour in (("DDP", real.ddp, _DDP), ("FSDP on gloo", real.fsdp, _FSDP))
        if costs.received is not None
    ]
    held = [
        Growth(f"{name}, measured", [world], [costs.state / parameter_bytes], colour, is_measured=True)
        for name, costs, colour in (("DDP", real.ddp, _DDP), ("FSDP", real.fsdp, _FSDP))
    ]
    traffic = [
        Growth("DDP", _WORLDS, [ddp_traffic(1, w) for w in _WORLDS], _DDP),
        Growth("FSDP", _WORLDS, [fsdp_traffic(1, w, g) for w in _WORLDS], _FSDP),
        Growth("FSDP on gloo", _WORLDS, [_on_gloo(w, g) for w in _WORLDS], _FSDP, dashed=True),
    ]
    states = [
        Growth(name, _WORLDS, [state_bytes(1, w, sharded=sharded, per_parameter=STATES) for w in _WORLDS], colour)
        for name, sharded, colour in (("DDP", False, _DDP), ("FSDP", True, _FSDP))
    ]
    ranks = "ranks W"
    return growth_figure(
        [
            GrowthPanel(f"into a rank per step, in P; g = {g}", ranks, [*traffic, *received], _WORLDS),
            GrowthPanel("states on a rank, in P", ranks, [*states, *held], _WORLDS),
            GrowthPanel("states on a rank, in GB", "parameters, billions", _by_model(), _BILLIONS, log_y=True),
        ]
    )


def _by_model() -> list[Growth]:
    """For models that no notebook can run: 16 bytes per parameter."""
    rows = (
        ("DDP", 1, False, _DDP, False),
        ("FSDP, W = 8", 8, True, _FSDP, False),
        ("FSDP, W = 64", 64, True, _FSDP, True),
    )
    lines = [
        Growth(name, _BILLIONS, [_gigabytes(billions, world, sharded) for billions in _BILLIONS], colour, dashed)
        for name, world, sharded, colour, dashed in rows
    ]
    device = Growth(f"{_DEVICE_GB} GB, one device", _BILLIONS, [_DEVICE_GB] * len(_BILLIONS), _GRAY)
    return [*lines, device]


def _gigabytes(billions: float, world_size: int, sharded: bool) -> float:
    return state_bytes(billions, world_size, sharded=sharded, per_parameter=MIXED_PRECISION_BYTES)


def _on_gloo(world_size: int, g: int) -> float:
    return fsdp_traffic(1, world_size, g, scatters_by_all_reduce=True)


def _words(real: RealRanks, parameter_bytes: int, g: int) -> str:
    """A table. One digit after the point: the engines' own words travel too, a few hundred bytes."""
    world, lines = real.world_size, []
    formulas = {"DDP": (real.ddp, ddp_traffic(1, world), False), "FSDP": (real.fsdp, _on_gloo(world, g), True)}
    for name, (costs, traffic, sharded) in formulas.items():
        came = "not told" if costs.received is None else f"{costs.received / parameter_bytes:.1f}"
        states = state_bytes(1, world, sharded=sharded, per_parameter=STATES)
        lines.append((name, came, f"{traffic:.1f}", f"{costs.state / parameter_bytes:.1f}", f"{states:.1f}"))
    columns = ("engine", "received", "formula", "states", "formula")
    title = f"In units of P, the bytes of the parameters; W = {world}, g = {g}, gloo; measured beside the formula."
    return "\n".join([title, *text_table(columns, lines)])
