"""W ranks, one gradient: what each rank may divide by, and how far their average is from that of a single process."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import ipywidgets
import traitlets
from matplotlib.figure import Figure

from sft_edu.accumulate import Comparison, compare, split_minibatch
from sft_edu.plots import bar_figure
from sft_edu.ranks.simulated import RANK_DENOMINATORS, MicrobatchSums, RanksResult, deal, microbatch_sums
from sft_edu.widgets import experiments, state
from sft_edu.widgets.bars import Bars
from sft_edu.widgets.lab import Lab, between, labelled, one_of
from sft_edu.widgets.table import text_table

_MOST = 64
_TITLE = "how far the ranks' average is off, gradient of a single process = 1"
_COLUMNS = ("denominator", "D", "off by", "length", "cosine")
_ROUNDING = 1e-12
_FOLLOWED, _OTHER = "gradient", "neutral"  # colours: the same denominator in both panels, and all others


class RanksLab(Lab):
    """Real sequences dealt to W simulated ranks, on a tiny model in float64; one sequence is one microbatch.

    Drive it by hand or from code: `lab.world_size = 64; lab`. `ranks/simulated.py` says how the ranks are simulated.

    Args:
        world_size: W, 1 to 64.
        num_sequences: 8 to 64; with fewer sequences than ranks, some ranks hold none.
        skew: 0, all responses equally long, to 1, the longest about 16 times as long as the shortest.
        denominator: one of `RANK_DENOMINATORS`, to be followed from one rank to 64.
    """

    SETTINGS: ClassVar = {
        "W": ("world_size", state.INTEGER),
        "sequences": ("num_sequences", state.INTEGER),
        "skew": ("skew", state.NUMBER),
        "denominator": ("denominator", state.NAME),
    }

    world_size = traitlets.Int(2)
    num_sequences = traitlets.Int(32)
    skew = traitlets.Float(1.0)
    denominator = traitlets.Unicode("local")

    def __init__(
        self, world_size: int = 2, num_sequences: int = 32, skew: float = 1.0, denominator: str = "local"
    ) -> None:
        super().__init__(world_size=world_size, num_sequences=num_sequences, skew=skew, denominator=denominator)

    @property
    def relative_error(self) -> float:
        """|average - gradient of a single process| / |gradient of a single process|, with the chosen denominator."""
        return self._compared[self.denominator].relative_error

    @traitlets.validate("denominator")
    def _check_denominator(self, proposal) -> str:
        return one_of("denominator", proposal["value"], RANK_DENOMINATORS)

    @traitlets.validate("world_size", "num_sequences", "skew")
    def _check_number(self, proposal) -> float:
        name = proposal["trait"].name
        low, high = {"world_size": (1, _MOST), "num_sequences": (8, _MOST), "skew": (0, 1)}[name]
        return between(name, proposal["value"], low, high)

    def _make(self) -> list[ipywidgets.Widget]:
        width = "260px"  # all of one: they stand in columns, three in a row or two
        choices = [(f"{name}: D = {one.formula}", name) for name, one in RANK_DENOMINATORS.items()]
        controls = (
            ipywidgets.IntSlider(min=1, max=_MOST, **labelled("W", "world_size, the ranks", width)),
            ipywidgets.IntSlider(min=8, max=_MOST, **labelled("sequences", "of the minibatch", width)),
            ipywidgets.FloatSlider(min=0, max=1, step=0.1, **labelled("skew", "of response lengths", width)),
            ipywidgets.Dropdown(options=choices, **labelled("D", "the denominator to follow", width)),
        )
        for (trait, _), control in zip(self.SETTINGS.values(), controls, strict=True):
            self._control(trait, control)
        self._every = Bars(limits=[0, 1])
        self._followed = Bars(limits=[0, 1])
        return [self._every, self._followed]

    def _compute(self) -> None:
        self._compared = {name: self._of(self.world_size, name) for name in RANK_DENOMINATORS}
        worlds = sorted({1, 2, 4, 8, 16, 32, 64, self.world_size})
        self._by_world = {world: self._of(world, self.denominator) for world in worlds}
        self._tokens = [share.num_tokens for share in self.result.shares]

    @property
    def result(self) -> RanksResult:
        """What the ranks hold and what their average is, with the chosen denominator."""
        return deal(_sums(self.num_sequences, self.skew), self.world_size, self.denominator)

    def _of(self, world_size: int, denominator: str) -> Comparison:
        return _compared(self.num_sequences, self.skew, world_size, denominator)

    def _show(self) -> None:
        with self._every.hold_sync():
            self._every.title = self._titles()[0]
            self._every.rows = self._rows()
            self._every.words = self.words()
            self._every.drawn = self._drawn
        with self._followed.hold_sync():
            self._followed.title = self._titles()[1]
            self._followed.rows = self._rows_by_world()
            self._followed.drawn = self._drawn

    def _titles(self) -> tuple[str, str]:
        formula = RANK_DENOMINATORS[self.denominator].formula
        return f"{_TITLE}; W = {self.world_size}", f"the same for D = {formula}, from one rank to {_MOST}"

    def _rows(self) -> list[dict]:
        return [
            _row(
                f"{name}, followed below" if name == self.denominator else name,
                found,
                _FOLLOWED if name == self.denominator else _OTHER,
                f"D = {RANK_DENOMINATORS[name].formula}, length {found.ratio:.4f}x, cosine {found.cosine:.4f}",
            )
            for name, found in self._compared.items()
        ]

    def _rows_by_world(self) -> list[dict]:
        return [
            _row(f"W = {world}", found, _FOLLOWED, "this one")
            if world == self.world_size
            else _row(f"W = {world}", found, _OTHER, "")
            for world, found in self._by_world.items()
        ]

    def figure(self) -> Figure:
        panels = zip(self._titles(), (self._rows(), self._rows_by_world()), strict=True)
        return bar_figure([(title, rows, None) for title, rows in panels])

    def numbers(self) -> list[str]:
        lines = [
            (
                name,
                RANK_DENOMINATORS[name].formula,
                _off(found),
                f"{found.ratio:.4f}x",
                f"{found.cosine:.4f}",
            )
            for name, found in self._compared.items()
        ]
        return text_table(_COLUMNS, lines)

    def _holdings(self) -> str:
        held = [tokens for tokens in self._tokens if tokens]
        if self.world_size == 1:
            return f"One rank holds all {held[0]} response tokens."
        empty = self.world_size - len(held)
        if not empty and min(held) == max(held):
            return f"Every rank holds {held[0]} response tokens."
        some = f"{min(held)} to {max(held)}" if min(held) < max(held) else str(held[0])
        rest = f"; {empty} of {self.world_size} hold none" if empty else ""
        return f"A rank holds {some} response tokens{rest}."

    def words(self) -> str:
        found, one = self._compared[self.denominator], RANK_DENOMINATORS[self.denominator]
        start = f"{self._holdings()} Each divides by {one.says}, and the engine averages."
        if found.relative_error < _ROUNDING:
            return f"{start} That is the gradient of a single process{self._luck()}."
        if 1 - found.cosine < _ROUNDING:
            return f"{start} The direction is right, the length is {found.ratio:.4f} of what it should be."
        return f"{start} The result points elsewhere: it is off by {_off(found)} of the length of the right gradient."

    def _luck(self) -> str:
        if self.denominator == "global_over_world":
            return ", whatever the ranks hold"
        return ", because there is one rank" if self.world_size == 1 else ", because all ranks hold as many tokens"


def _row(label: str, found: Comparison, colour: str, note: str) -> dict:
    error = found.relative_error if found.relative_error > _ROUNDING else 0.0
    return {"label": label, "value": error, "text": _off(found), "colour": colour, "note": note}


def _off(found: Comparison) -> str:
    """Rounding alone may differ between machines."""
    return f"{found.relative_error if found.relative_error > _ROUNDING else 0.0:.4f}"


@lru_cache(maxsize=4)
def _sums(num_sequences: int, skew: float) -> MicrobatchSums:
    return microbatch_sums(
        experiments.model(), split_minibatch(experiments.minibatch(num_sequences, skew), num_sequences)
    )


@lru_cache(maxsize=512)
def _compared(num_sequences: int, skew: float, world_size: int, denominator: str) -> Comparison:
    dealt = deal(_sums(num_sequences, skew), world_size, denominator)
    return compare(dealt.gradient, experiments.reference(num_sequences, skew))
