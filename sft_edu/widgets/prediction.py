"""A question to answer before the answer is shown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets

from sft_edu.course.progress import current
from sft_edu.widgets.figure import with_text_and_picture
from sft_edu.widgets.keyboard import KeyboardGuard


class Prediction(ipywidgets.VBox):
    """Choose, then reveal. The answer is computed by the cell that asks, never typed in.

    Args:
        question: one sentence.
        options: the answers to choose from.
        answer: the right one, among the options.
        because: why, in a sentence or two.

    Raises:
        ValueError: the answer is not among the options.
    """

    def __init__(self, question: str, options: Sequence[str], answer: str, because: str) -> None:
        if answer not in options:
            raise ValueError(f"answer: got {answer!r}; expected one of {list(options)}")
        self.question, self.options, self.answer, self.because = question, list(options), answer, because
        self._choice = ipywidgets.RadioButtons(
            options=self.options, value=None, layout={"width": "max-content", "max_width": "100%"}
        )
        self._button = ipywidgets.Button(description="reveal", disabled=True, tooltip="choose an answer first")
        self._verdict = ipywidgets.HTML()
        self._choice.observe(self._enable, "value")
        self._button.on_click(lambda _: self.reveal())
        title = ipywidgets.HTML(f"<b>Predict.</b> {escape(question)}")
        super().__init__([title, self._choice, self._button, self._verdict, KeyboardGuard()])
        self.add_class("sft-edu-prediction")

    @property
    def choice(self) -> str | None:
        return self._choice.value

    @choice.setter
    def choice(self, option: str) -> None:
        self._choice.value = option

    def reveal(self) -> str:
        """The verdict on the choice, also shown below it."""
        if self.choice is None:
            return "Choose an answer first."
        current().predicted(self.question, self.choice, right=self.choice == self.answer)
        start = "Right." if self.choice == self.answer else f"You said: {self.choice}."
        verdict = f"{start} The answer is: {self.answer}. {self.because}"
        self._verdict.value = f"<p>{escape(verdict)}</p>"
        return verdict

    def _enable(self, change) -> None:
        self._button.disabled = self.choice is None
        self._verdict.value = ""

    def __repr__(self) -> str:
        return f"Predict. {self.question}\n" + "\n".join(f"  ( ) {option}" for option in self.options)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self))
