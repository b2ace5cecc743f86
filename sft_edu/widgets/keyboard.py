"""What the controls of ipywidgets lack for those who use keys or a screen reader."""

from __future__ import annotations

from pathlib import Path

from sft_edu.widgets.live_view import LiveView

_HERE = Path(__file__).parent


class KeyboardGuard(LiveView):
    """Seen only when it has something to say: the controls beside it keep their keys, and have names and focus rings.

    It says the range when a number that was typed after a slider is out of it.
    """

    _esm = _HERE / "keyboard.js"
    _css = _HERE / "keyboard.css"

    def __repr__(self) -> str:
        return "KeyboardGuard()"
