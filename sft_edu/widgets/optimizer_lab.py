"""Which bugs does the optimizer hide? The same wrong denominator under SGD and AdamW, with and without clipping."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import ipywidgets
import traitlets
from matplotlib.figure import Figure

from sft_edu.digits import fixed
from sft_edu.optimizer_runs import (
    BUGS,
    HIDES,
    OPTIMIZERS,
    SEQUENCES,
    STEPS,
    Outcome,
    Run,
    outcome,
    pair_weights,
    run_optimizer,
)
from sft_edu.plots import bar_figure
from sft_edu.widgets import state
from sft_edu.widgets.bars import Bars
from sft_edu.widgets.lab import Lab, between, labelled, one_of
from sft_edu.widgets.table import html_table, text_table

_TITLE = "how far the parameters have moved, with the right gradient = 1"
_COLUMNS = ("optimizer", "length (predicted)", "cosine (predicted)", "prediction", "off by", "clips (with bug)")
_LEGEND = (
    "exact: the predicted length and cosine hold to six digits. off by: the length of the difference to the right "
    f"change, as a share of that change; below {HIDES:g} the bug is hidden."
)
_SMALL = "margin: 4px 0 0; font-size: 12px; line-height: 16px"
_ROUNDING = 1e-9  # may differ between machines


class OptimizerLab(Lab):
    """A wrong denominator and the right one, each fed to torch's SGD and AdamW, for up to 50 real steps.

    The model is a table of logits in float64, trained on eight sequences. Drive it by hand or from code:
    `lab.optimizer_steps = 50; lab`.

    Args:
        bug: one of `BUGS` of `sft_edu.optimizer_runs`.
        gradient_accumulation_steps: G, 1 to 8.
        eps: of AdamW, 1e-12 to 0.01.
        max_norm: where gradients are clipped in the rows with clipping, 0.01 to 10.
        learning_rate: of all optimizers, 0.001 to 1.
        optimizer_steps: 1 to 50.
    """

    SETTINGS: ClassVar = {
        "bug": ("bug", state.NAME),
        "G": ("gradient_accumulation_steps", state.INTEGER),
        "steps": ("optimizer_steps", state.INTEGER),
        "eps": ("eps", state.NUMBER),
        "max_norm": ("max_norm", state.NUMBER),
        "lr": ("learning_rate", state.NUMBER),
    }

    bug = traitlets.Unicode("G_twice")
    gradient_accumulation_steps = traitlets.Int(8)
    optimizer_steps = traitlets.Int(1)
    eps = traitlets.Float(1e-8)
    max_norm = traitlets.Float(0.1)
    learning_rate = traitlets.Float(0.01)

    def __init__(
        self,
        bug: str = "G_twice",
        gradient_accumulation_steps: int = 8,
        optimizer_steps: int = 1,
        eps: float = 1e-8,
        max_norm: float = 0.1,
        learning_rate: float = 0.01,
    ) -> None:
        super().__init__(
            bug=bug,
            gradient_accumulation_steps=gradient_accumulation_steps,
            optimizer_steps=optimizer_steps,
            eps=eps,
            max_norm=max_norm,
            learning_rate=learning_rate,
        )
        self._state_box.layout.width = "560px"  # as long as the longest state

    @traitlets.validate("bug")
    def _check_bug(self, proposal) -> str:
        return one_of("bug", proposal["value"], BUGS)

    @traitlets.validate("gradient_accumulation_steps", "optimizer_steps", "eps", "max_norm", "learning_rate")
    def _check_number(self, proposal) -> float:
        name = proposal["trait"].name
        low, high = {
            "gradient_accumulation_steps": (1, SEQUENCES),
            "optimizer_steps": (1, STEPS),
            "eps": (1e-12, 1e-2),
            "max_norm": (0.01, 10),
            "learning_rate": (1e-3, 1),
        }[name]
        return between(name, proposal["value"], low, high)

    def _make(self) -> list[ipywidgets.Widget]:
        width = "232px"  # all of one: they stand in columns, and reset beside the last
        bugs = [(f"{bug.says}: D = {bug.formula}", name) for name, bug in BUGS.items()]
        powers = {"step": 1, "readout_format": ".0e"}
        controls = (
            ipywidgets.Dropdown(options=bugs, **labelled("bug", "instead of D = N", width)),
            ipywidgets.IntSlider(min=1, max=SEQUENCES, **labelled("G", "gradient_accumulation_steps", width)),
            ipywidgets.IntSlider(min=1, max=STEPS, **labelled("steps", "of the optimizer", width)),
            ipywidgets.FloatLogSlider(min=-12, max=-2, **powers, **labelled("eps", "of AdamW", width)),
            ipywidgets.FloatLogSlider(
                min=-2, max=1, step=0.1, readout_format=".3g", **labelled("max_norm", "of clipping", width)
            ),
            ipywidgets.FloatLogSlider(min=-3, max=0, **powers, **labelled("lr", "learning rate", width)),
        )
        for (trait, _), control in zip(self.SETTINGS.values(), controls, strict=True):
            self._control(trait, control)
        self._bars = Bars(
            title=f"{_TITLE} (logarithmic)",
            limits=[0.01, 1000],
            log=True,
            reference=1,
            reference_label="right gradient",
        )
        self._table = ipywidgets.HTML()
        return [self._bars, self._table]

    def _compute(self) -> None:
        norms = (None, self.max_norm)
        self.results = [self._outcome(optimizer, norm) for norm in norms for optimizer in OPTIMIZERS]

    def _outcome(self, optimizer: str, max_norm: float | None) -> Outcome:
        eps = self.eps if optimizer == "AdamW" else 0.0  # SGD has none: one run for all of them
        wrong = _run(self.bug, self.gradient_accumulation_steps, optimizer, self.learning_rate, eps, max_norm)
        right = _run(None, 1, optimizer, self.learning_rate, eps, max_norm)
        return outcome(wrong, right, optimizer, steps=self.optimizer_steps, eps=eps, max_norm=max_norm)

    def _show(self) -> None:
        with self._bars.hold_sync():
            self._bars.rows = self._rows()
            self._bars.words = self.words()
            self._bars.drawn = self._drawn
        self._table.value = f'{html_table(_COLUMNS, self._lines())}<p style="{_SMALL}">{_LEGEND}</p>'

    def _rows(self) -> list[dict]:
        return [
            {
                "label": result.name,
                "value": result.measured.ratio,
                "text": f"{fixed(result.measured.ratio)}x",
                "colour": BUGS[self.bug].rule or "neutral",
                "note": f"cosine {fixed(result.measured.cosine)}; length predicted {fixed(result.predicted.ratio)}x",
            }
            for result in self.results
        ]

    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (
                result.name,
                f"{fixed(result.measured.ratio)}x ({fixed(result.predicted.ratio)}x)",
                f"{fixed(result.measured.cosine)} ({fixed(result.predicted.cosine)})",
                "exact" if result.is_exact else "differs",
                fixed(_off(result)),
                self._clips(result),
            )
            for result in self.results
        ]

    def _clips(self, result: Outcome) -> str:
        if result.right_clips is None:
            return "-"
        return f"{result.right_clips} ({result.bug_clips}) of {self.optimizer_steps}"

    def figure(self) -> Figure:
        return bar_figure([(_TITLE, self._rows(), 1.0)], log=True)

    def numbers(self) -> list[str]:
        return text_table(_COLUMNS, self._lines())

    def words(self) -> str:
        bug, steps = BUGS[self.bug], f"{self.optimizer_steps} step{'s' * (self.optimizer_steps > 1)}"
        exact = sum(result.is_exact for result in self.results)
        return (
            f"{bug.says[0].upper()}{bug.says[1:]}: D is {bug.formula} instead of N. After {steps}, {self._hiding()} "
            f"The prediction knows the first step only; it is exact in {exact} of {len(self.results)} rows."
        )

    def _hiding(self) -> str:
        if all(_off(result) == 0 for result in self.results):
            return "nothing differs: at G = 1 that is the same."
        hiding = [result.name for result in self.results if result.hides]
        if not hiding:
            return f"no optimizer hides it: every change is more than {HIDES:.0%} off."
        verb = "hide it: their changes are" if len(hiding) > 1 else "hides it: its change is"
        return f"{' and '.join(hiding)} {verb} within {HIDES:.0%} of the right one."


def _off(result: Outcome) -> float:
    """How far a change is off, without what is rounding alone."""
    error = result.measured.relative_error
    return error if error > _ROUNDING else 0.0


@lru_cache(maxsize=64)
def _run(bug: str | None, steps: int, optimizer: str, learning_rate: float, eps: float, max_norm: float | None) -> Run:
    """Runs are long, whatever is shown of them: a slider of steps then only looks at another place."""
    weights = pair_weights(bug, steps)
    return run_optimizer(weights, optimizer, learning_rate=learning_rate, eps=eps, max_norm=max_norm)
