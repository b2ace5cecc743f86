"""A minibatch in G microbatches: watch the gradient fill up, beside the gradient of the whole."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import ipywidgets
import torch
import traitlets
from matplotlib.figure import Figure

from sft_edu.accumulate import compare, split_minibatch
from sft_edu.log_probs import get_response_log_probs
from sft_edu.memory import saved_bytes
from sft_edu.plots import bar_figure
from sft_edu.scaling import RULES
from sft_edu.widgets import experiments, state
from sft_edu.widgets.bars import Bars
from sft_edu.widgets.lab import Lab, between, labelled, one_of

# For up to 32 numbers; nothing below them moves when there are more.
_TWO_LINES = "min-height: 32px; margin: 0 1px; font-size: 12px; line-height: 16px; font-variant-numeric: tabular-nums"


class AccumulationLab(Lab):
    """A minibatch of real sequences, split into G microbatches, on a tiny model in float64.

    It opens before the first microbatch: play, or drag *played*. Drive it by hand or from code: `lab.played = 2; lab`.
    Memory is what autograd holds for backward, measured.

    Args:
        num_sequences: 8 to 32.
        gradient_accumulation_steps: G, 1 to 32; more than there are sequences count as that many.
        rule: one of `RULES`.
        imbalance: 0, all responses equally long, to 1, the longest about 16 times as long as the shortest.
        played: how many microbatches have run; at most G. When all have run and G changes, all have run of the new G;
            a state text that names both is taken as it is.
    """

    SETTINGS: ClassVar = {
        "sequences": ("num_sequences", state.INTEGER),
        "G": ("gradient_accumulation_steps", state.INTEGER),
        "rule": ("rule", state.NAME),
        "imbalance": ("imbalance", state.NUMBER),
        "played": ("played", state.INTEGER),
    }

    num_sequences = traitlets.Int(8)
    gradient_accumulation_steps = traitlets.Int(4)
    rule = traitlets.Unicode("token_mean")
    imbalance = traitlets.Float(0.5)
    played = traitlets.Int(0)

    def __init__(
        self,
        num_sequences: int = 8,
        gradient_accumulation_steps: int = 4,
        rule: str = "token_mean",
        imbalance: float = 0.5,
        played: int = 0,
    ) -> None:
        super().__init__(
            num_sequences=num_sequences,
            gradient_accumulation_steps=gradient_accumulation_steps,
            rule=rule,
            imbalance=imbalance,
            played=played,
        )

    @property
    def ratio(self) -> float:
        """|gradient so far| / |gradient of the full batch|, that of the mean over all its response tokens."""
        return self._comparison.ratio

    @property
    def cosine(self) -> float:
        """Of the angle between the gradient so far and that of the full batch."""
        return self._comparison.cosine

    @property
    def microbatch_bytes(self) -> int:
        """The most that one microbatch holds for backward."""
        return self._bytes[0]

    @property
    def full_batch_bytes(self) -> int:
        """What the whole minibatch at once holds for backward."""
        return self._bytes[1]

    @traitlets.validate("rule")
    def _check_rule(self, proposal) -> str:
        return one_of("rule", proposal["value"], RULES)

    @traitlets.validate("num_sequences", "gradient_accumulation_steps", "played")
    def _check_count(self, proposal) -> int:
        name = proposal["trait"].name
        low = {"num_sequences": 8, "gradient_accumulation_steps": 1, "played": 0}[name]
        return between(name, proposal["value"], low, 32)

    @traitlets.validate("imbalance")
    def _check_imbalance(self, proposal) -> float:
        return between("imbalance", proposal["value"], 0, 1)

    def _make(self) -> list[ipywidgets.Widget]:
        sequences = ipywidgets.IntSlider(min=8, max=32, **labelled("sequences", "of the minibatch", "260px"))
        steps = ipywidgets.IntSlider(min=1, max=32, **labelled("G", "gradient_accumulation_steps", "260px"))
        rule = ipywidgets.Dropdown(options=list(RULES), **labelled("rule", "the denominator", "260px"))
        ragged = ipywidgets.FloatSlider(min=0, max=1, step=0.1, **labelled("imbalance", "of response lengths", "260px"))
        played = ipywidgets.IntSlider(min=0, max=32, **labelled("played", "microbatches that have run", "260px"))
        controls = (sequences, steps, rule, ragged, played)
        # All of one width: they stand in columns, three in a row or two.
        for (trait, _), control in zip(self.SETTINGS.values(), controls, strict=True):
            self._control(trait, control)
        play = ipywidgets.Play(min=0, max=32, interval=600, **labelled("", "run the microbatches one by one", "130px"))
        self._control("played_by_play", play)
        self._gradient = Bars(title="length of the gradient, full batch = 1", reference=1, reference_label="full batch")
        self._memory = Bars(title="memory held for backward, bytes")
        self._tokens = ipywidgets.HTML()
        return [self._tokens, self._gradient, self._memory]

    # The play button counts too; it is a second control for the same setting.
    played_by_play = property(lambda self: self.played, lambda self, value: setattr(self, "played", value))

    def _changed(self, change) -> None:
        with self._lock:
            of_steps = change["name"] == "gradient_accumulation_steps" and not self._writing
            if of_steps and self.played == change["old"]:
                self.played = change["new"]  # which computes and draws both
            else:
                super()._changed(change)

    def _compute(self) -> None:
        self.gradient_accumulation_steps = min(self.gradient_accumulation_steps, self.num_sequences)
        self.played = min(self.played, self.gradient_accumulation_steps)
        for name in ("played", "played_by_play"):
            self._controls[name].max = self.gradient_accumulation_steps
        self._controls["gradient_accumulation_steps"].max = self.num_sequences
        self._reference = experiments.reference(self.num_sequences, self.imbalance)
        self._result = experiments.accumulated(
            self.num_sequences, self.imbalance, self.gradient_accumulation_steps, self.rule, keep_running=True
        )
        zero = torch.zeros_like(self._reference)
        so_far = (zero, *self._result.running)[self.played]
        self._comparison, self._finished = (
            compare(so_far, self._reference),
            compare(self._result.gradient, self._reference),
        )
        # Here, where grad mode is set: without it nothing is held.
        self._bytes = [_held(self.num_sequences, self.imbalance, steps) for steps in (len(self._result.losses), 1)]

    def _show(self) -> None:
        self._tokens.value = f'<p style="{_TWO_LINES}">{self._token_counts()}</p>'
        with self._gradient.hold_sync():
            # The end counts too, so that the axis stays while the microbatches play.
            self._gradient.limits = [0, max(1.5, self.ratio, self._finished.ratio)]
            self._gradient.rows = self._gradient_rows()
            self._gradient.words = self.words()
            self._gradient.drawn = self._drawn
        with self._memory.hold_sync():
            self._memory.limits = [0, self.full_batch_bytes]
            self._memory.rows = self._memory_rows()
            self._memory.drawn = self._drawn

    def _gradient_rows(self) -> list[dict]:
        label = f".grad after {self.played} of {self.gradient_accumulation_steps}"
        return [
            _row(label, self.ratio, f"{self.ratio:.4f}x", self.rule, self._direction()),
            _row("full batch", 1.0, "1.0000x", "neutral", "all sequences at once"),
        ]

    def _direction(self) -> str:
        return f"cosine {self.cosine:.4f}" if self.played else "no direction yet"

    def _memory_rows(self) -> list[dict]:
        one, whole = self.microbatch_bytes, self.full_batch_bytes
        return [
            _row("largest microbatch", one, f"{one:,}", "neutral", f"{one / whole:.4f} of the full batch"),
            _row("full batch", whole, f"{whole:,}", "neutral", "all sequences at once"),
        ]

    def figure(self) -> Figure:
        return bar_figure(
            [
                ("length of the gradient, full batch = 1", self._gradient_rows(), 1.0),
                ("bytes held for backward", self._memory_rows(), None),
            ]
        )

    def numbers(self) -> list[str]:
        return [
            self._token_counts(),
            f"Against the full batch: length {self.ratio:.4f}x, {self._direction()}.",
            f"Held for backward: {self.microbatch_bytes / self.full_batch_bytes:.2f} of what the full batch holds.",
        ]

    def _token_counts(self) -> str:
        counts = self._result.num_tokens.tolist()
        total = f" = {sum(counts)}" if len(counts) > 1 else ""
        return f"Response tokens per microbatch: {' + '.join(map(str, counts))}{total}."

    def words(self) -> str:
        steps, error = self.gradient_accumulation_steps, self._finished.relative_error
        if self.played < steps:
            return f"{self.played} of {steps} microbatches have added their share. The optimizer waits for all of them."
        if error < 1e-12 and steps == 1:
            return "One microbatch is the full batch: the same gradient, and the same memory."
        if error < 1e-12:
            return (
                f"All {steps} microbatches together give the gradient of the full batch, and each needed less memory."
            )
        if 1 - self._finished.cosine < 1e-12:
            return (
                f"The direction is that of the full batch, the length is {self._finished.ratio:.4f} times its length."
            )
        return (
            f"This is not the gradient of the full batch: it points elsewhere, and is off by {error:.4f} of its length."
        )


def _row(label: str, value: float, text: str, colour: str, note: str) -> dict:
    return {"label": label, "value": value, "text": text, "colour": colour, "note": note}


@lru_cache(maxsize=64)
def _held(num_sequences: int, imbalance: float, steps: int) -> int:
    model, largest = experiments.model(), split_minibatch(experiments.minibatch(num_sequences, imbalance), steps)[0]
    return saved_bytes(lambda: get_response_log_probs(model, largest["input_ids"], largest["labels"]), model, largest)
