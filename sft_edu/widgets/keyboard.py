"""What the controls of ipywidgets lack for those who use keys or a screen reader."""

from __future__ import annotations

from sft_edu.widgets.live_view import LiveView
from sft_edu.widgets.page import page_text


class KeyboardGuard(LiveView):
    """Seen only when it has something to say: the controls beside it keep their keys, and have names and focus rings.

    It says the range when a number that was typed after a slider is out of it.
    """

    _esm = page_text("keyboard.js")
    _css = page_text("keyboard.css")

    def __repr__(self) -> str:
        return "KeyboardGuard()"
