"""Buttons that save a picture as a file, drawn by the kernel when asked."""

from __future__ import annotations

import html
import io
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import traitlets
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from sft_edu.plots import FAINT
from sft_edu.widgets.live_view import LiveView, text, wrong
from sft_edu.widgets.page import page_text

FORMATS = ("png", "svg")

_PIXELS_PER_INCH = 200
_MARGIN, _POINTS = 0.08, 7  # around a caption, in inches, and the size of its font
_LETTER = 0.61 * _POINTS / 72  # inches that a letter is wide
_SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "sft_edu"}  # letters stay text; equal pictures, equal files
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_drawing = threading.RLock()  # for matplotlib's settings, and for a figure that two buttons draw


class SavePicture(LiveView):
    """Two buttons, 'save PNG' and 'save SVG'. From code: `save.to_file("step.svg")`.

    Args:
        make_figure: makes the figure as it should be now. Called for each file, possibly on another thread: a
            `matplotlib.figure.Figure`, never pyplot.
        name: of the downloaded file, without its ending.
        description: what the figure shows, in words, or a function that says so after `make_figure` has run. It goes
            into the file.
        title: of the figure, `name` if empty. It goes into the file too.
        caption: a line below the figure, or a function that says so after `make_figure` has run. The file is as much
            taller.
    """

    _esm = page_text("save_picture.js")
    name = traitlets.Unicode("picture").tag(sync=True)

    def __init__(
        self,
        make_figure: Callable[[], Figure],
        name: str = "picture",
        description: str | Callable[[], str] = "",
        title: str = "",
        caption: str | Callable[[], str] = "",
        **layout: object,
    ) -> None:
        self.make_figure, self.description, self.title, self.caption = make_figure, description, title, caption
        super().__init__(name=name, **layout)
        self.on_msg(self._answer)

    @traitlets.validate("name")
    def _check_name(self, proposal) -> str:
        name = text("name", proposal["value"])
        if not name.isprintable() or re.search(r'^[.\s]|[<>:"/\\|?*]|[.\s]$|^$', name):
            raise wrong("name", name, "a file name without folder and ending")
        return name

    def to_bytes(self, file_format: str) -> bytes:
        """The picture as a file, `png` or `svg`."""
        if file_format not in FORMATS:
            raise ValueError(f"file_format: got {file_format!r}; expected one of {', '.join(FORMATS)}")
        with _drawing:
            figure = self.make_figure()
            if not isinstance(figure, Figure):
                raise TypeError(f"make_figure: got {type(figure).__name__}; expected a matplotlib.figure.Figure")
            description, caption = (said() if callable(said) else said for said in (self.description, self.caption))
            draw = _svg if file_format == "svg" else _png
            with _captioned(figure, caption) as box:
                return draw(figure, self.title or self.name, description, box)

    def to_file(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the picture to a file that ends in .png or .svg.

        Raises:
            FileExistsError: there is such a file, and `overwrite` is not True.
        """
        path = Path(path)
        file_format = path.suffix.lower().removeprefix(".")
        if file_format not in FORMATS:
            raise ValueError(f"path: got {path.name!r}; expected a name that ends in .png or .svg")
        if path.exists() and not overwrite:  # told before the drawing; the mode "x" sees to it
            raise FileExistsError(f"path: {path.name} exists; expected a new file, or overwrite=True")
        content = self.to_bytes(file_format)
        with path.open("wb" if overwrite else "xb") as file:
            file.write(content)
        return path

    def _answer(self, _, message: object, buffers: object) -> None:
        """A view of the page asks. Every view hears the answer, so it bears the number of the question."""
        if not isinstance(message, dict) or message.get("kind") != "save":
            return
        answer = {"kind": "saved", "request": message.get("request")}
        try:
            file_format = message.get("format")
            content = self.to_bytes(file_format)
        except Exception as error:
            self.send({**answer, "error": text("error", f"{type(error).__name__}: {error}")})
            raise  # with its traceback, into the log
        self.send({**answer, "file": f"{self.name}.{file_format}"}, buffers=[content])

    def __repr__(self) -> str:
        return f"SavePicture({self.name!r}): save PNG, save SVG"


@contextmanager
def _captioned(figure: Figure, caption: str) -> Iterator[Bbox]:
    """Write the caption below the figure for a while; what is to be saved, in inches. Nothing in the figure moves."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(caption, max(1, int((width - 2 * _MARGIN) / _LETTER)))
    look = {"family": "monospace", "fontsize": _POINTS, "color": FAINT, "linespacing": 1.3, "parse_math": False}
    written = figure.text(_MARGIN / width, -_MARGIN / height, "\n".join(lines), va="top", **look)
    below = len(lines) * 1.5 * _POINTS / 72 + 2 * _MARGIN if lines else 0
    below = round(below * _PIXELS_PER_INCH) / _PIXELS_PER_INCH  # whole pixels, or the figure would blur
    try:
        yield Bbox([[0, -below], [width, height]])
    finally:
        written.remove()


def _png(figure: Figure, title: str, description: str, box: Bbox) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Title": title, "Description": description}
    figure.savefig(buffer, format="png", dpi=_PIXELS_PER_INCH, metadata=metadata, bbox_inches=box)
    return buffer.getvalue()


def _svg(figure: Figure, title: str, description: str, box: Bbox) -> bytes:
    """With `<title>` and `<desc>` at its top, which screen readers read."""
    buffer = io.StringIO()
    before = {name: matplotlib.rcParams[name] for name in _SVG_SETTINGS}
    matplotlib.rcParams.update(_SVG_SETTINGS)
    try:
        metadata = {"Title": title, "Description": description, "Date": None}
        figure.savefig(buffer, format="svg", metadata=metadata, bbox_inches=box)
    finally:
        matplotlib.rcParams.update(before)
    described = f"</title>\n <desc>{html.escape(description, quote=False)}</desc>"
    return _NOT_IN_XML.sub("\ufffd", buffer.getvalue().replace("</title>", described, 1)).encode()
