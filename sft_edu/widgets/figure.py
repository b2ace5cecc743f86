"""A matplotlib Figure in a notebook, with words for those who cannot see it."""

from __future__ import annotations

import io

import anywidget
import traitlets
from matplotlib.figure import Figure

from sft_edu.widgets.page import page_text

_PIXELS_PER_INCH = 96  # of the page
_SHARPNESS = 1.5  # drawn larger than shown, for screens with small pixels


class FigureView(anywidget.AnyWidget):
    """Shows a figure and keeps showing it as it changes: `view.show(figure, alt)`.

    `alt` describes what the figure shows now. `png` is the picture as a file.
    """

    _esm = page_text("figure.js")
    _css = page_text("figure.css")
    png = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int().tag(sync=True)
    height = traitlets.Int().tag(sync=True)

    def show(self, figure: Figure, alt: str) -> None:
        """Draw the figure as it is now. Picture and description arrive together."""
        with self.hold_sync():
            self.width, self.height = (round(inches * _PIXELS_PER_INCH) for inches in figure.get_size_inches())
            self.alt = alt
            self.png = png_of(figure)

    def __repr__(self) -> str:
        return f"FigureView: {self.alt}"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return with_text_and_picture(super()._repr_mimebundle_(**kwargs), repr(self), self.png)


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PIXELS_PER_INCH * _SHARPNESS)
    return buffer.getvalue()


def with_text_and_picture(bundle: dict | tuple, text: str, png: bytes = b"") -> dict | tuple:
    """A widget's mime bundle with its whole text, and a still picture for readers without a kernel."""
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    data["text/plain"] = text  # ipywidgets cuts it after 110 characters
    if png:
        data["image/png"] = png
    return bundle
