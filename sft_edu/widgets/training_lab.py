"""A model that learns before one's eyes: curves and answers that grow while it trains."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import ClassVar

import ipywidgets
import traitlets
from matplotlib.figure import Figure
from torch import nn

from sft_edu.plots import curve_figure
from sft_edu.scaling import RULES
from sft_edu.training.run import stops_on_interrupt
from sft_edu.training.train import Record
from sft_edu.training.train_config import OPTIMIZERS
from sft_edu.widgets import state, training_view
from sft_edu.widgets.answers import Answers
from sft_edu.widgets.background import Background
from sft_edu.widgets.curves import Curves
from sft_edu.widgets.lab import Lab, alert, between, labelled, one_of
from sft_edu.widgets.training_run import LOOKS, Examples, Material, TrainingRun, built_in, own_settings

_PAUSE = 0.1  # seconds from one picture to the next
_USUAL = {
    "learning_rate": (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "max_norm": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0, 10000.0),
}
_SWITCH = state.Kind(lambda value: str(int(value)), lambda text: bool(("0", "1").index(text)))


class TrainingLab(Lab):
    """A tiny model that cannot answer learns to, live: `lab.start()`, or `lab.run(100)` to wait for it.

    Training has a thread of its own; other cells run meanwhile. Every change of a setting begins a new run from the
    same weights, and the run before stays as a dotted line, once it has seen a fortieth of its sequences.

    Args:
        examples: to train on, such as `load_jsonl` returns; the built-in tasks if None.
        held_out: to be answered without having been trained on; `examples` themselves if None.
        gradient_accumulation_steps: G, 1 to 32.
        microbatch_size: sequences in a microbatch, 1 to 64.
        rule: one of `RULES`.
        optimizer: "adamw" or "sgd".
        learning_rate: its highest value, 1e-5 to 10.
        max_norm: where the gradient is clipped, 0.01 to 10,000.
        train_on_prompt: count the prompt's tokens too.

    Raises:
        TypeError, ValueError: the examples cannot be used; see `encode`.
        TraitError: a setting is out of range.
    """

    SETTINGS: ClassVar = {
        "G": ("gradient_accumulation_steps", state.INTEGER),
        "microbatch": ("microbatch_size", state.INTEGER),
        "rule": ("rule", state.NAME),
        "optimizer": ("optimizer", state.NAME),
        "lr": ("learning_rate", state.NUMBER),
        "max_norm": ("max_norm", state.NUMBER),
        "prompt": ("train_on_prompt", _SWITCH),
    }

    gradient_accumulation_steps = traitlets.Int(4)
    microbatch_size = traitlets.Int(16)
    rule = traitlets.Unicode("token_mean")
    optimizer = traitlets.Unicode("adamw")
    learning_rate = traitlets.Float(3e-3)
    max_norm = traitlets.Float(1.0)
    train_on_prompt = traitlets.Bool(False)

    def __init__(
        self,
        examples: Examples | None = None,
        held_out: Examples | None = None,
        *,
        gradient_accumulation_steps: int = 4,
        microbatch_size: int = 16,
        rule: str = "token_mean",
        optimizer: str = "adamw",
        learning_rate: float = 3e-3,
        max_norm: float = 1.0,
        train_on_prompt: bool = False,
    ) -> None:
        if held_out is not None and not held_out:
            raise ValueError("held_out: got none; expected at least one, or None to ask the examples themselves")
        asked = examples if held_out is None else held_out
        self._material = built_in() if examples is None else Material.of(examples, asked)
        self._asked = "held-out" if examples is None or held_out is not None else "training"
        self._run: TrainingRun | None = None
        self._before: TrainingRun | None = None
        self._training = Background(self._draw_end, name="TrainingLab")
        self._rate = 0.0  # tokens a second
        super().__init__(
            gradient_accumulation_steps=gradient_accumulation_steps,
            microbatch_size=microbatch_size,
            rule=rule,
            optimizer=optimizer,
            learning_rate=learning_rate,
            max_norm=max_norm,
            train_on_prompt=train_on_prompt,
        )
        self._state_box.layout.flex = "1 1 660px"  # as long as the longest state
        *knobs, switch, reset = self.children[0].children
        self.children[0].children = knobs
        switch.layout.margin = "2px 2px 2px 20px"
        self._buttons.children = [self._go_button, self._step_button, reset, switch]

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self._run.training.step

    @property
    def running(self) -> bool:
        """Whether it trains."""
        return self._training.running

    @property
    def exact_match(self) -> float:
        """The share of right answers, 0 to 1, when it was last looked at."""
        return self._run.looks[-1].scores.exact_match

    @property
    def records(self) -> list[Record]:
        """What each optimizer step of this run did."""
        return self._run.records[:]

    @property
    def model(self) -> nn.Module:
        """The model as it is now; it changes while the lab trains."""
        return self._run.training.model

    def start(self, steps: int | None = None) -> None:
        """Train in the background, to the end or for so many optimizer steps. If it does that already, go on."""
        with self._lock:
            if not self._run.finished:
                self._training.start(lambda should_stop: self._train(should_stop, steps))
                self._draw()

    def pause(self) -> None:
        """Stop after the microbatch at hand, and wait for that."""
        self._training.stop()
        self._training.wait()

    def run(self, steps: int | None = None) -> None:
        """Train here and now, to the end or for so many optimizer steps.

        Raises:
            KeyboardInterrupt: the kernel was interrupted. The microbatch is finished, and the run can go on.
            Exception: what ended the run; the lab shows it too.
        """
        with stops_on_interrupt() as interrupted:
            run = self._training.here(lambda should_stop: self._train(lambda: should_stop() or interrupted(), steps))
        if run is not None and run.error is not None:
            raise run.error
        if interrupted():
            raise KeyboardInterrupt

    def reset(self) -> None:
        """Back to the settings with which the lab was made, before any training, and with nothing to compare with."""
        with self._lock:
            self._training.stop()
            super().reset()
            self._before = None
            self._draw()

    def close(self) -> None:
        """End the training too."""
        if hasattr(self, "_training"):
            self.pause()
        super().close()

    def _train(self, should_stop: Callable[[], bool], steps: int | None) -> TrainingRun:
        """Until it is told to stop or finished. Nobody waits for the lock meanwhile, but to draw."""
        with own_settings():
            run = self._run
            until = math.inf if steps is None else run.training.step + steps
            start, drawn, tokens = time.monotonic(), time.monotonic(), run.num_tokens
            while not (should_stop() or run.finished or run.training.step >= until):
                run.advance()
                now = time.monotonic()
                if now - drawn >= _PAUSE:
                    self._rate, drawn = (run.num_tokens - tokens) / (now - start), now
                    self._draw()
                if run is not self._run and steps is None:  # a setting was changed: go on with the new run
                    run, start, tokens = self._run, now, 0
                elif run is not self._run:
                    break
            if steps is not None:
                run.look()
            return run

    @traitlets.validate("rule", "optimizer")
    def _check_name(self, proposal) -> str:
        name = proposal["trait"].name
        return one_of(name, proposal["value"], RULES if name == "rule" else OPTIMIZERS)

    @traitlets.validate("gradient_accumulation_steps", "microbatch_size", "learning_rate", "max_norm")
    def _check_number(self, proposal) -> float:
        name = proposal["trait"].name
        low, high = {
            "gradient_accumulation_steps": (1, 32),
            "microbatch_size": (1, 64),
            "learning_rate": (1e-5, 10),
            "max_norm": (0.01, 1e4),
        }[name]
        return between(name, proposal["value"], low, high)

    def _make(self) -> list[ipywidgets.Widget]:
        width = "256px"  # all of one: they stand in columns, three in a row or two
        controls = (
            ipywidgets.IntSlider(min=1, max=32, **labelled("G", "gradient_accumulation_steps", width)),
            ipywidgets.IntSlider(min=1, max=64, **labelled("microbatch", "sequences in it", width)),
            ipywidgets.Dropdown(options=list(RULES), **labelled("rule", "the denominator", width)),
            ipywidgets.Dropdown(options=list(OPTIMIZERS), **labelled("optimizer", "that steps", width)),
            ipywidgets.Dropdown(**labelled("lr", "highest learning rate", width)),
            ipywidgets.Dropdown(**labelled("max_norm", "of clipping", width)),
            ipywidgets.Checkbox(indent=False, **labelled("train on prompt tokens too", "mask 1 for all", "220px")),
        )
        for (trait, _), control in zip(self.SETTINGS.values(), controls, strict=True):
            self._control(trait, control)
        self._offer()
        self._go_button = ipywidgets.Button(button_style="primary", layout={"width": "90px"})
        self._go_button.on_click(lambda _: self._go_by_hand())
        self._step_button = ipywidgets.Button(
            description="one step", tooltip="of the optimizer", layout={"width": "90px"}
        )
        self._step_button.on_click(lambda _: self.start(steps=1))
        self._buttons = ipywidgets.HBox()
        self._curves, self._answers = Curves(x_title=training_view.X_TITLE), Answers()
        return [self._buttons, self._curves, self._answers]

    def _offer(self) -> None:
        """Let the menus of numbers have the numbers that code has set, too."""
        for trait, usual in _USUAL.items():
            numbers = sorted({*usual, getattr(self, trait)})
            options = tuple((f"{number:g}", number) for number in numbers)
            if self._controls[trait].options != options:
                self._controls[trait].options = options

    def _go_by_hand(self) -> None:
        """The one button that starts, pauses and resumes. A hand does not wait for the microbatch."""
        if self.running:
            self._training.stop()
            self._draw()
        else:
            self.start()

    def _compute(self) -> None:
        run, settings = self._run, {trait: getattr(self, trait) for trait, _ in self.SETTINGS.values()}
        if run is not None and run.seen * LOOKS >= run.num_sequences:
            self._before = run
        self._run = TrainingRun(self._material, settings)
        self._offer()

    def _draw(self) -> None:
        with self._lock:
            self._drawn += 1
            self._show()

    def _draw_end(self) -> None:
        self._rate = 0.0
        self._draw()

    def _show(self) -> None:
        run, running = self._run, self.running
        begun = run.training.step or run.training.microbatch
        self._go_button.description = (
            "pause" if running else "finished" if run.training.finished else "resume" if begun else "start"
        )
        self._go_button.disabled = run.finished and not running
        self._step_button.disabled = run.finished or running
        with self._curves.hold_sync():
            self._curves.panels = training_view.panels(run, self._before, self._asked)
            self._curves.lines = training_view.lines(run, self._asked)
            self._curves.before = training_view.lines_before(self._before)
            self._curves.end = training_view.end(run, self._before)
            self._curves.status = training_view.status(run, running, self._rate)
            self._curves.words = self.words()
            self._curves.drawn = self._drawn
        with self._answers.hold_sync():
            step = run.looks[-1].step
            self._answers.title = f"{self._asked} answers " + (f"after step {step}" if step else "before training")
            self._answers.rows = training_view.answer_rows(run)
            self._answers.drawn = self._drawn
        if run.error is not None:
            self._complaint.value = alert(run.error)

    def figure(self) -> Figure:
        with self._lock:
            run, before = self._run, self._before
        drawn = [*training_view.lines_before(before), *training_view.lines(run, self._asked)]
        return curve_figure(
            training_view.panels(run, before, self._asked), drawn, training_view.end(run, before), training_view.X_TITLE
        )

    def numbers(self) -> list[str]:
        return [training_view.counts(self._run)]

    def words(self) -> str:
        run, before = self._run, self._before
        said = [training_view.verdicts(run, self._asked)]
        if run.error is not None:
            said.append(f"{type(run.error).__name__} ended the run.")
        if self.train_on_prompt:
            said.append("In training the NLL counts prompt tokens too.")
        if before is not None:
            said.append(f"Dotted: the run before, with {self._difference(before)}.")
        return " ".join(said)

    def _difference(self, run: TrainingRun) -> str:
        others = [
            f"{key}={kind.write(run.settings[trait])}"
            for key, (trait, kind) in self.SETTINGS.items()
            if run.settings[trait] != getattr(self, trait)
        ]
        return " ".join(others) or "the same settings"
