"""Work that goes on until it is told to stop, on a thread of its own or on the caller's."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
Work = Callable[[Callable[[], bool]], Result]
"""Is given a function that says when to stop, and asks it often."""

_PATIENCE = 0.05  # seconds from one look at whether there is still something to wait for to the next
_ALL: weakref.WeakSet[Background] = weakref.WeakSet()


class _Piece:
    """Of work: whether it is to stop, and whether it has."""

    def __init__(self) -> None:
        self.stop, self.done = threading.Event(), threading.Event()


class Background:
    """One piece of work at a time. The next one begins when the last has seen that it is to stop.

    Args:
        ended: called after each piece of work, still before the next one begins.
        name: of the thread.
    """

    def __init__(self, ended: Callable[[], object], name: str) -> None:
        self._ended, self._name = ended, name
        self._last = _Piece()  # the one that was begun last
        self._last.stop.set()
        self._at_work: _Piece | None = None
        self._beginning, self._turn = threading.Lock(), threading.Lock()
        _ALL.add(self)

    @property
    def running(self) -> bool:
        """Whether there is work that has neither ended nor been told to stop."""
        return not self._last.stop.is_set()

    def start(self, work: Work) -> None:
        """On a thread of its own, which ends with the work. Where some is running, that goes on instead."""
        with self._beginning:
            if not self.running:
                self._last = piece = _Piece()
                threading.Thread(target=self._do, args=(work, piece), name=self._name, daemon=True).start()

    def here(self, work: Work[Result]) -> Result | None:
        """On this thread, in place of what is running: the work is done when this returns.

        Returns:
            What the work returned, or None where it was told to stop before it began.
        """
        with self._beginning:
            self._last.stop.set()
            self._last = piece = _Piece()
        return self._do(work, piece)

    def stop(self) -> None:
        """Tell the work to stop, and do not wait."""
        self._last.stop.set()

    def wait(self) -> None:
        """Until whoever was told to stop has stopped. Not for who holds a lock that the work wants."""
        piece = self._at_work
        if piece is not None and piece.stop.is_set():
            piece.done.wait()

    def _do(self, work: Work[Result], piece: _Piece) -> Result | None:
        while not self._turn.acquire(timeout=_PATIENCE):
            if piece.stop.is_set():
                return None
        try:
            self._at_work = piece
            return None if piece.stop.is_set() else work(piece.stop.is_set)
        finally:
            piece.stop.set()
            try:
                self._ended()
            finally:
                self._at_work = None
                piece.done.set()
                self._turn.release()


@atexit.register
def _stop_all() -> None:
    """A thread in the middle of a backward would abort the process that ends."""
    for background in list(_ALL):
        background.stop()
        background.wait()
