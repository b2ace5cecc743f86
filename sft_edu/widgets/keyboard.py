"""Keys that belong to a control stay with it."""

from __future__ import annotations

from pathlib import Path

from sft_edu.widgets.live_view import LiveView


class KeyboardGuard(LiveView):
    """An invisible widget: the controls beside it do not pass their keys on to JupyterLab's shortcuts."""

    _esm = Path(__file__).parent / "keyboard.js"

    def __repr__(self) -> str:
        return "KeyboardGuard()"
