"""What the labs share: a mask of toggles, a picture that follows it, a sentence that says what the picture shows."""

from __future__ import annotations

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

Mask = tuple[tuple[int, ...], ...]


class Lab(ipywidgets.VBox):
    """One microbatch with its mask, gradients and numbers, redrawn whenever something changes.

    Subclasses add controls, name their settings, and say in words what the step does.
    """

    gradient_accumulation_steps = traitlets.Int(1, min=1, max=32)
    normalize_constant = traitlets.Float(1.0, min=0.1, max=100.0)
    rule = traitlets.Unicode("notes")
    mask = traitlets.Any()

    def __init__(
        self,
        policy_log_probs: torch.Tensor,
        mask: Mask,
        roles: Sequence[Sequence[str]],
        tokens: Sequence[Sequence[str]] | None = None,
    ) -> None:
        # A callback may run on another thread while a cell is busy; one step at a time.
        self._lock = threading.RLock()
        self._ready = False
        self._log_probs = policy_log_probs.detach().clone()
        self._first_mask = mask
        self._picture = StepPicture(roles, tokens)
        self._view = FigureView()
        self._words = ipywidgets.HTML()
        self._toggles = _toggles(mask, tokens)
        super().__init__(mask=mask)
        for toggle in self._flat_toggles():
            toggle.observe(self._read_toggles, "value")
        reset = ipywidgets.Button(description="reset", tooltip="back to where this lab started")
        reset.on_click(lambda _: self.reset())
        controls = ipywidgets.HBox([*self._controls(), reset], layout={"flex_flow": "row wrap"})
        caption = ipywidgets.HTML("<small>response_mask: press a token to switch it between 1 (dark) and 0</small>")
        grid = ipywidgets.VBox([ipywidgets.HBox(row) for row in self._toggles])
        self.children = [controls, caption, grid, self._view, self._words]
        self._ready = True
        self._refresh()

    def reset(self) -> None:
        """Back to the state in which the lab was made."""
        raise NotImplementedError

    def _controls(self) -> list[ipywidgets.Widget]:
        raise NotImplementedError

    def _settings(self) -> str:
        raise NotImplementedError

    def _sentence(self) -> str:
        raise NotImplementedError

    @traitlets.validate("mask")
    def _check_mask(self, proposal) -> Mask:
        rows = proposal["value"]
        rows = rows.tolist() if isinstance(rows, torch.Tensor) else rows
        mask = tuple(tuple(int(value) for value in row) for row in rows)
        expected = list(self._log_probs.shape)
        if [len(row) for row in mask] != [expected[1]] * expected[0] or any(v not in (0, 1) for r in mask for v in r):
            raise traitlets.TraitError(f"mask: got {rows!r}; expected {expected} values 0 or 1")
        return mask

    @traitlets.observe("mask", "gradient_accumulation_steps", "normalize_constant", "rule")
    def _refresh(self, change=None) -> None:
        if not self._ready:
            return
        with self._lock:
            self._write_toggles()
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
        gradient = self._trace.grad("policy_log_probs").tolist()
        rows = {row.name: row for row in self._trace.rows()}
        steps = {name: (row.formula, f"{row.value:.4f}") for name, row in rows.items() if name in _SCALARS}
        steps["num_tokens"] = (rows["num_tokens"].formula, str(self.num_tokens))
        steps["backward"] = (rows["backward"].formula, f"{self.token_gradient:.4f} or 0")
        self._picture.update(steps, self._log_probs.tolist(), self.mask, gradient)
        sentence = self._sentence()
        self._words.value = f"<p>{escape(sentence)}</p>"
        self._view.show(self._picture.figure, self._numbers() + " " + sentence)

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

    @property
    def token_gradient(self) -> float:
        """The gradient of each response token; 0 if there is none."""
        return float(self.gradient.min())

    def _numbers(self) -> str:
        trace = self._trace
        return (
            f"num_tokens {self.num_tokens}, masked_sum {trace['masked_sum']:.4f}, loss {trace['loss']:.4f}, "
            f"scaled_loss {trace['scaled_loss']:.4f}, gradient {self.token_gradient:.4f} where the mask is 1."
        )

    def __repr__(self) -> str:
        mask = " ".join("".join(map(str, row)) for row in self.mask)
        return f"{type(self).__name__}({self._settings()}, mask={mask!r})\n{self._numbers()}\n{self._sentence()}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self), self._view.png)

    def _flat_toggles(self) -> list[ipywidgets.ToggleButton]:
        return [toggle for row in self._toggles for toggle in row]

    def _read_toggles(self, change) -> None:
        if self._ready:
            self.mask = tuple(tuple(int(toggle.value) for toggle in row) for row in self._toggles)

    def _write_toggles(self) -> None:
        self._ready = False  # or each toggle would read the half-written others back
        try:
            for toggle, value in zip(self._flat_toggles(), (v for row in self.mask for v in row), strict=True):
                toggle.value = bool(value)
        finally:
            self._ready = True


_SCALARS = ("masked_sum", "loss", "scaled_loss", "returned_loss")


def _toggles(mask: Mask, tokens: Sequence[Sequence[str]] | None) -> list[list[ipywidgets.ToggleButton]]:
    width = "64px" if len(mask[0]) <= 8 else "38px"
    return [
        [
            ipywidgets.ToggleButton(
                value=bool(value),
                description=tokens[row][column] if tokens else f"{row}, {column}",
                tooltip=f"sequence {row}, token {column}",
                layout={"width": width, "padding": "0", "margin": "1px"},
                style={"font_size": "11px"},
            )
            for column, value in enumerate(values)
        ]
        for row, values in enumerate(mask)
    ]
