"""What the labs share: settings that follow hand and code, views that follow the settings, a state to hand out."""

from __future__ import annotations

import textwrap
import threading
from html import escape
from typing import ClassVar

import ipywidgets
import torch
import traitlets
from matplotlib.figure import Figure

from sft_edu.widgets import state
from sft_edu.widgets.figure import png_of, with_text_and_picture
from sft_edu.widgets.keyboard import KeyboardGuard
from sft_edu.widgets.save_picture import SavePicture


class Lab(ipywidgets.VBox):
    """Settings, and numbers that follow them: computed by autograd in the kernel, drawn by the page.

    A subclass lists its settings, makes controls for some and views for the numbers, and says how to compute, to show,
    and to put into words. Whatever changes a setting, a hand or code, recomputes and redraws everything, once.
    """

    SETTINGS: ClassVar[dict[str, tuple[str, state.Kind]]] = {}
    """Key of a setting in the state text -> the trait that holds it, and how it is written."""

    def __init__(self, **settings: object) -> None:
        # A callback may run on another thread while a cell is busy: whoever holds the lock changes the lab.
        self._lock = threading.RLock()
        self._writing = True  # the lab is setting its own traits and controls; nobody's hand is
        self._start = settings
        self._controls: dict[str, ipywidgets.Widget] = {}
        self._drawn = 0
        super().__init__()
        views = self._make()
        reset = ipywidgets.Button(description="reset", tooltip="back to the start", layout={"width": "70px"})
        reset.on_click(lambda _: self.reset())
        controls = ipywidgets.HBox([*self._controls.values(), reset], layout={"flex_flow": "row wrap"})
        self._state_box = ipywidgets.Text(
            continuous_update=False, **labelled("state", "copy it, or paste another", "440px")
        )
        self._state_box.layout.flex = "1 1 440px"  # a mask of two sentences is long
        self._state_box.observe(self._state_by_hand, "value")
        # What is said of a number stands below the numbers, what is said of a state below the state.
        self._complaint, self._state_complaint = ipywidgets.HTML(), ipywidgets.HTML()
        name = type(self).__name__
        save = SavePicture(self.figure, name, description=lambda: repr(self), caption=lambda: f"{name}: {self.state}")
        footer = ipywidgets.HBox([self._state_box, save], layout={"flex_flow": "row wrap"})
        self.children = [controls, self._complaint, *views, footer, self._state_complaint, KeyboardGuard()]
        self.observe(self._changed, [trait for trait, _ in self.SETTINGS.values()])
        self.reset()

    def reset(self) -> None:
        """Back to the settings with which the lab was made."""
        self._apply(self._start)

    @property
    def state(self) -> str:
        """The settings in one line; `type(lab).from_state(lab.state)` is a lab like this one."""
        return state.write({key: (kind, getattr(self, trait)) for key, (trait, kind) in self._written().items()})

    @state.setter
    def state(self, text: str) -> None:
        read = state.read(text, {key: kind for key, (_, kind) in self.SETTINGS.items()})
        self._apply({self.SETTINGS[key][0]: value for key, value in read.items()})

    @classmethod
    def from_state(cls, text: str, *arguments: object, **settings: object) -> Lab:
        """A lab with the settings of a state text. What the text leaves out is as in a new lab.

        Args:
            text: what `lab.state` gave.
            arguments: those of the class, where the other lab was made with any.
            settings: likewise.

        Raises:
            ValueError: a word of the text is no setting of this lab, or its value cannot be read.
            TraitError: a value is out of range.
        """
        lab = cls(*arguments, **settings)
        lab.state = text
        lab._start = {trait: getattr(lab, trait) for trait, _ in cls.SETTINGS.values()}
        return lab

    def figure(self) -> Figure:
        """The numbers as they are now, as a picture to look at or to save."""
        raise NotImplementedError

    def words(self) -> str:
        """What the numbers mean, in a sentence or two."""
        raise NotImplementedError

    def numbers(self) -> list[str]:
        """The numbers themselves, in lines of text."""
        raise NotImplementedError

    def _make(self) -> list[ipywidgets.Widget]:
        """Make the controls, `_control` each, and return the views."""
        raise NotImplementedError

    def _compute(self) -> None:
        raise NotImplementedError

    def _show(self) -> None:
        raise NotImplementedError

    def _written(self) -> dict[str, tuple[str, state.Kind]]:
        """The settings worth writing into the state text."""
        return self.SETTINGS

    def _control(self, trait: str, control: ipywidgets.Widget) -> None:
        """Let a control and a setting follow each other."""
        self._controls[trait] = control
        control.observe(lambda change: self._by_hand(trait, change["new"]), "value")

    def _by_hand(self, trait: str, value: object) -> None:
        with self._lock:
            if self._writing:
                return
            try:
                setattr(self, trait, value)
            except traitlets.TraitError as error:  # typed, and out of range: answered in words, and taken back
                self._complaint.value = alert(error)
                self._controls[trait].value = getattr(self, trait)

    def _state_by_hand(self, change) -> None:
        with self._lock:
            if self._writing:
                return
            try:
                self.state = change["new"]
            except (ValueError, traitlets.TraitError) as error:
                self._state_complaint.value = alert(error)

    def _apply(self, settings: dict[str, object]) -> None:
        """Set all of them, or none if one is refused; then compute and draw once."""
        with self._lock:
            before = {trait: getattr(self, trait) for trait in settings}
            self._writing = True
            try:
                for trait, value in settings.items():
                    setattr(self, trait, value)
            except BaseException:
                for trait, value in before.items():
                    setattr(self, trait, value)
                raise
            finally:
                self._writing = False
            self._refresh()

    def _changed(self, change) -> None:
        with self._lock:
            if not self._writing:
                self._refresh()

    def _refresh(self) -> None:
        """Compute and draw. Grad mode and device belong to the thread, and nobody knows on which this runs."""
        self._writing = True  # or a control would set its trait again while others still hold old values
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
                self._compute()
            self._drawn += 1
            self._show()  # first: what the hand waits for
            for trait, control in self._controls.items():
                control.value = getattr(self, trait)
            self._state_box.value = self.state
            self._complaint.value = self._state_complaint.value = ""
        finally:
            self._writing = False

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {self.state}", *self.numbers()]
        return "\n".join(wrapped for line in [*lines, self.words()] for wrapped in textwrap.wrap(line, 100))

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self), png_of(self.figure()))


def alert(error: Exception) -> str:
    """HTML that is read out as soon as it stands there."""
    return f'<span role="alert">{escape(str(error))}</span>'


def labelled(symbol: str, meaning: str, width: str) -> dict:
    """How a control of a lab is labelled: its symbol before it, its meaning on hover."""
    return {
        "description": symbol,
        "tooltip": meaning,
        "layout": {"width": width, "margin": "2px 16px 2px 2px"},
        "style": {"description_width": "initial"},
    }


def one_of(trait: str, value: str, names) -> str:
    """The value, if it is among the names."""
    if value not in names:
        raise traitlets.TraitError(f"{trait}: got {value!r}; expected one of {', '.join(names)}")
    return value


def between(trait: str, value: float, low: float, high: float) -> float:
    """The value, if it is in range. NaN is not, though it passes the limits of a traitlet."""
    if not low <= value <= high:
        raise traitlets.TraitError(f"{trait}: got {value}; expected {low:g} to {high:g}")
    return value
