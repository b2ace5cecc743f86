"""What the labs share: a mask of toggles, a picture that follows it, a sentence that says what the picture shows."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Sequence
from html import escape

import ipywidgets
import torch
import traitlets

from sft_edu.plots import StepPicture
from sft_edu.step import sft_microbatch_train_step
from sft_edu.trace import Trace
from sft_edu.widgets.figure import FigureView, with_text_and_picture
from sft_edu.widgets.step_view import describe, draw

Mask = tuple[tuple[int, ...], ...]


class Lab(ipywidgets.VBox):
    """One microbatch with its mask, gradients and numbers, redrawn whenever something changes.

    Subclasses add controls, name their settings, and say in words what the step does.
    """

    gradient_accumulation_steps = traitlets.Int(1, min=1, max=32)
    normalize_constant = traitlets.Float(1.0)
    rule = traitlets.Unicode("notes")
    mask = traitlets.Any()

    def __init__(
        self,
        policy_log_probs: torch.Tensor,
        mask: torch.Tensor,
        roles: Sequence[Sequence[str]],
        tokens: Sequence[Sequence[str]] | None = None,
        **settings: object,
    ) -> None:
        # A callback may run on another thread while a cell is busy: whoever holds the lock changes the lab.
        self._lock = threading.RLock()
        self._writing = True  # the lab is setting its own traits or controls, nobody's hand is
        self._log_probs = policy_log_probs.detach().clone()
        self._start = {"mask": as_tuples(mask), **settings}
        self._picture = StepPicture(roles, tokens)
        self._view = FigureView()
        self._words = ipywidgets.HTML()
        self._controls: dict[str, ipywidgets.Widget] = {}
        self._toggles = _toggles(self._start["mask"], tokens)
        super().__init__()
        for toggle in self._flat_toggles():
            toggle.observe(self._read_toggles, "value")
        reset = ipywidgets.Button(description="reset", tooltip="back to the start", layout={"width": "80px"})
        reset.on_click(lambda _: self.reset())
        self._add_controls()
        controls = ipywidgets.HBox([*self._controls.values(), reset], layout={"flex_flow": "row wrap"})
        caption = ipywidgets.HTML("<small>response_mask: press a token to switch it between 1 (dark) and 0</small>")
        grid = ipywidgets.VBox([ipywidgets.HBox(row) for row in self._toggles])
        self.children = [controls, caption, grid, self._view, self._words]
        self.reset()

    def reset(self) -> None:
        """Back to the state in which the lab was made."""
        with self._lock:
            self._writing = True  # one drawing at the end, not one for each trait
            try:
                for name, value in self._start.items():
                    setattr(self, name, value)
            finally:
                self._writing = False
            self._refresh()

    def _add_controls(self) -> None:
        """Make the controls, and `_control` each."""
        raise NotImplementedError

    def _control(self, trait: str, control: ipywidgets.Widget) -> None:
        """Let a control and a trait follow each other."""
        self._controls[trait] = control
        control.observe(lambda change: self._by_hand(trait, change["new"]), "value")

    def _settings(self) -> str:
        raise NotImplementedError

    def _sentence(self) -> str:
        raise NotImplementedError

    @traitlets.validate("normalize_constant")
    def _check_constant(self, proposal) -> float:
        if not 0.1 <= proposal["value"] <= 100:  # NaN passes the limits of a traitlet
            raise traitlets.TraitError(f"normalize_constant: got {proposal['value']}; expected 0.1 to 100")
        return proposal["value"]

    @traitlets.validate("mask")
    def _check_mask(self, proposal) -> Mask:
        mask, expected = torch.as_tensor(proposal["value"]), self._log_probs.shape
        if mask.shape != expected or not ((mask == 0) | (mask == 1)).all():
            raise traitlets.TraitError(f"mask: got {proposal['value']!r}; expected {list(expected)} values 0 or 1")
        return as_tuples(mask)

    @traitlets.observe("mask", "gradient_accumulation_steps", "normalize_constant", "rule")
    def _refresh(self, change=None) -> None:
        with self._lock:
            if not self._writing:
                self._write_controls()
                self._run()
                self._draw()

    def _run(self) -> None:
        """One real step on a fresh leaf. Grad mode is set here: it belongs to the thread."""
        mask = torch.tensor(self.mask)
        self._trace = Trace()
        with torch.enable_grad():
            sft_microbatch_train_step(
                self._log_probs.clone().requires_grad_(),
                mask,
                self.gradient_accumulation_steps,
                self.normalize_constant,
                rule=self.rule,
                minibatch_tokens=max(int(mask.sum()), 1) * self.gradient_accumulation_steps,
                tap=self._trace,
            )

    def _draw(self) -> None:
        sentence = self._sentence()
        draw(self._picture, self._trace)
        self._words.value = f"<p>{escape(sentence)}</p>"
        self._view.show(self._picture.figure, f"{describe(self._trace)} {sentence}")

    @property
    def num_tokens(self) -> int:
        """Ones in the mask."""
        return int(self._trace["num_tokens"])

    @property
    def loss(self) -> float:
        """What the step returned."""
        return float(self._trace["returned_loss"])

    @property
    def gradient(self) -> torch.Tensor:
        """d scaled_loss / d policy_log_probs, `[B, T]`."""
        return self._trace.grad("policy_log_probs")

    def __repr__(self) -> str:
        mask = " ".join("".join(map(str, row)) for row in self.mask)
        title = f"{type(self).__name__}({self._settings()}, mask={mask!r})"
        return "\n".join([title, *textwrap.wrap(describe(self._trace), 100), *textwrap.wrap(self._sentence(), 100)])

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self), self._view.png)

    def _flat_toggles(self) -> list[ipywidgets.ToggleButton]:
        return [toggle for row in self._toggles for toggle in row]

    def _read_toggles(self, change) -> None:
        self._by_hand("mask", [[int(toggle.value) for toggle in row] for row in self._toggles])

    def _by_hand(self, trait: str, value: object) -> None:
        with self._lock:
            if not self._writing:
                setattr(self, trait, value)

    def _write_controls(self) -> None:
        self._writing = True  # or each toggle would read the half-written others back
        try:
            for trait, control in self._controls.items():
                control.value = getattr(self, trait)
            for toggle, value in zip(self._flat_toggles(), (v for row in self.mask for v in row), strict=True):
                toggle.value = bool(value)
        finally:
            self._writing = False


def as_tuples(mask: torch.Tensor) -> Mask:
    """A mask as a value: equal masks are equal, and nobody can change one from outside."""
    return tuple(tuple(row) for row in mask.int().tolist())


def labelled(symbol: str, meaning: str, width: str) -> dict:
    """How a control of a lab is labelled: its symbol before it, its meaning on hover."""
    return {
        "description": symbol,
        "tooltip": meaning,
        "layout": {"width": width, "margin": "2px 16px 2px 2px"},
        "style": {"description_width": "initial"},
    }


def _toggles(mask: Mask, tokens: Sequence[Sequence[str]] | None) -> list[list[ipywidgets.ToggleButton]]:
    width = "64px" if len(mask[0]) <= 8 else "36px"
    return [
        [
            ipywidgets.ToggleButton(
                value=bool(value),
                description=tokens[row][column].strip("<>") or tokens[row][column] if tokens else f"{row}, {column}",
                tooltip=f"sequence {row}, token {column}",
                layout={"width": width, "padding": "0", "margin": "1px"},
                style={"font_size": "11px"},
            )
            for column, value in enumerate(values)
        ]
        for row, values in enumerate(mask)
    ]
