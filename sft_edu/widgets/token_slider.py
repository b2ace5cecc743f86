"""A slider for the log-prob of one token."""

from __future__ import annotations

import math

import ipywidgets
import traitlets


class TokenSlider(ipywidgets.FloatSlider):
    """A slider that says which token it is about, and moves only when a hand or the kernel moves it.

    The page can show whole steps only. Given a value between two of them, it shows the nearer one, and reports that as
    if a hand had moved there; it also adds a rounding error to each value it sends. So two values on the same step
    count as one: the page's report changes nothing, and the kernel does not send a value back that only looks new.

    `token` travels with the value: row and column.
    """

    token = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(0, 0)).tag(sync=True)

    def turn(self, token: tuple[int, int], value: float) -> None:
        """Be about another token, in one message."""
        with self.hold_sync():
            self.token = token
            self.value = value

    def set_state(self, sync_data: dict) -> None:
        """Take what a page sends, unless it is the step on which the slider stands."""
        value = sync_data.get("value")
        if isinstance(value, int | float) and self._step_of(value) == self._step_of(self.value):
            sync_data = {name: sent for name, sent in sync_data.items() if name != "value"}
        super().set_state(sync_data)

    @traitlets.validate("value")
    def _validate_value(self, proposal: dict) -> float:
        value = super()._validate_value(proposal)  # within the range
        step = self._step_of(value)
        is_news = value != proposal["value"] or step != self._step_of(self.value)
        return round(step * self.step, 9) if is_news else self.value

    def _step_of(self, value: float) -> int:
        """As JavaScript rounds: halves go up."""
        return math.floor(value / self.step + 0.5)
