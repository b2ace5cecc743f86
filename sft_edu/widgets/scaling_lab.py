"""All rules side by side: what each makes of the same minibatch, and what an optimizer makes of that."""

from __future__ import annotations

from typing import ClassVar

import ipywidgets
import traitlets
from matplotlib.figure import Figure

from sft_edu.accumulate import compare
from sft_edu.digits import fixed
from sft_edu.optimizer_view import optimizer_view
from sft_edu.plots import bar_figure
from sft_edu.scaling import RULES
from sft_edu.widgets import experiments, state
from sft_edu.widgets.bars import Bars
from sft_edu.widgets.lab import Lab, between, labelled
from sft_edu.widgets.table import html_table, text_table

_SEQUENCES = 8
_COLUMNS = ("rule", "D", "length", "cosine", "logged loss", "SGD lr", "AdamW step", "clipped")


class ScalingLab(Lab):
    """Eight real sequences in G microbatches under each of the five rules, on a tiny model in float64.

    Every gradient is compared with the per-token mean of the full batch. Drive it by hand or from code:
    `lab.imbalance = 1; lab`.

    Args:
        gradient_accumulation_steps: G, 1 to 8.
        imbalance: 0, all responses equally long, to 1, the longest about 16 times as long as the shortest.
        max_norm: where gradients are clipped, 0.01 to 100.
    """

    SETTINGS: ClassVar = {
        "G": ("gradient_accumulation_steps", state.INTEGER),
        "imbalance": ("imbalance", state.NUMBER),
        "max_norm": ("max_norm", state.NUMBER),
    }

    gradient_accumulation_steps = traitlets.Int(4)
    imbalance = traitlets.Float(0.5)
    max_norm = traitlets.Float(1.0)

    def __init__(self, gradient_accumulation_steps: int = 4, imbalance: float = 0.5, max_norm: float = 1.0) -> None:
        super().__init__(
            gradient_accumulation_steps=gradient_accumulation_steps, imbalance=imbalance, max_norm=max_norm
        )

    @traitlets.validate("gradient_accumulation_steps")
    def _check_steps(self, proposal) -> int:
        return between("gradient_accumulation_steps", proposal["value"], 1, _SEQUENCES)

    @traitlets.validate("imbalance")
    def _check_imbalance(self, proposal) -> float:
        return between("imbalance", proposal["value"], 0, 1)

    @traitlets.validate("max_norm")
    def _check_max_norm(self, proposal) -> float:
        return between("max_norm", proposal["value"], 0.01, 100)

    def _make(self) -> list[ipywidgets.Widget]:
        steps = labelled("G", "gradient_accumulation_steps", "260px")
        ragged = labelled("imbalance", "of response lengths", "260px")
        norm = labelled("max_norm", "the length at which gradients are clipped", "160px")
        self._control("gradient_accumulation_steps", ipywidgets.IntSlider(min=1, max=_SEQUENCES, **steps))
        self._control("imbalance", ipywidgets.FloatSlider(min=0, max=1, step=0.1, **ragged))
        self._control("max_norm", ipywidgets.FloatText(step=0.5, **norm))
        self._bars = Bars(
            title="length of the accumulated gradient, full-batch token mean = 1 (logarithmic)",
            limits=[0.1, 1000],
            log=True,
            reference=1,
            reference_label="full batch",
        )
        self._table = ipywidgets.HTML()
        return [self._bars, self._table]

    def _compute(self) -> None:
        reference = experiments.reference(_SEQUENCES, self.imbalance)
        runs = {
            rule: experiments.accumulated(_SEQUENCES, self.imbalance, self.gradient_accumulation_steps, rule)
            for rule in RULES
        }
        self._tokens = runs["token_mean"].num_tokens.tolist()
        self.results = {
            rule: {
                "comparison": compare(run.gradient, reference),
                "optimizer": optimizer_view(run.gradient, reference, max_norm=self.max_norm),
                "logged": run.logged_loss.item(),
            }
            for rule, run in runs.items()
        }

    def _show(self) -> None:
        with self._bars.hold_sync():
            self._bars.rows = self._rows()
            self._bars.words = self.words()
            self._bars.drawn = self._drawn
        self._table.value = html_table(_COLUMNS, self._lines(), left=2)

    def _rows(self) -> list[dict]:
        return [
            {
                "label": rule,
                "value": result["comparison"].ratio,
                "text": f"{fixed(result['comparison'].ratio)}x",
                "colour": rule,
                "note": f"D = {RULES[rule].formula}, cosine {fixed(result['comparison'].cosine)}",
            }
            for rule, result in self.results.items()
        ]

    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (
                rule,
                RULES[rule].formula,
                f"{fixed(result['comparison'].ratio)}x",
                fixed(result["comparison"].cosine),
                fixed(result["logged"]),
                f"{fixed(result['optimizer'].learning_rate_factor)}x",
                f"{fixed(result['optimizer'].adamw.ratio)}x",
                "yes" if result["optimizer"].clips else "no",
            )
            for rule, result in self.results.items()
        ]

    def figure(self) -> Figure:
        return bar_figure(
            [("length of the accumulated gradient, full-batch token mean = 1", self._rows(), 1.0)], log=True
        )

    def numbers(self) -> list[str]:
        return text_table(_COLUMNS, self._lines())

    def words(self) -> str:
        exact = [rule for rule, result in self.results.items() if result["comparison"].relative_error < 1e-12]
        aligned = [rule for rule, result in self.results.items() if 1 - result["comparison"].cosine < 1e-12]
        tokens = ", ".join(map(str, self._tokens))
        return (
            f"With {tokens} response tokens in the microbatches, the gradient of the full batch is reached by "
            f"{_listed(exact)}; its direction by {_listed(aligned)}."
        )


def _listed(rules: list[str]) -> str:
    *most, last = rules or ["no rule"]
    return f"{', '.join(most)} and {last}" if most else last
