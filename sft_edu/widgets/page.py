"""The page's side of a widget, read from the files beside this one."""

from pathlib import Path

_HERE = Path(__file__).parent


def page_text(*names: str) -> str:
    """Files joined to one text, because anywidget loads one and a widget cannot import its neighbour.

    A part keeps its exports, which do no harm there, so that a test can import it alone. Text and not paths: anywidget
    watches paths, through a signal that would keep every closed widget in memory.
    """
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in names)
