"""How far long work has come, for whoever shows it: nobody, where this package is a library, and on all ranks but one.

Work says what it is and how much of it there is, and keeps count. A display looks at it whenever it likes, so that in a
hot loop counting costs an addition, and nothing that works knows of displays. As messages go to whoever listens to a
logger, work goes to the board of this process, if there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

GREETED = "HERETIC_DS_GREETED"
"""Environment variable: set where name and version stand on the screen already."""


@dataclass(eq=False)
class Work:
    """One piece of work in hand."""

    what: str
    """In a few words, as in ``capture`` or ``reading the weights``."""
    total: float | None = None
    """How much there is to do; None where nobody knows."""
    unit: str = ""
    """What is counted, in the plural: ``prompts``; ``bytes`` are told in larger units."""
    done: float = 0.0
    measure: Callable[[], float] | None = None
    """Tells how much is done in the place of ``done``; it is called from another thread."""
    started: float = field(default_factory=time.monotonic)
    _first: float = 0.0
    _end: float | None = None

    def __post_init__(self) -> None:
        self._first = self.done

    def advance(self, count: float = 1) -> None:
        """Count what was done."""
        self.done += count

    def reached(self) -> float:
        """How much is done."""
        return self.done if self.measure is None else self.measure()

    def expect(self, seconds: float | None) -> None:
        """Take so many seconds from now for what is left, instead of reckoning by what is done."""
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def expects(self) -> bool:
        """Whether somebody said how long the rest takes."""
        return self._end is not None

    def seconds_left(self) -> float | None:
        """What is left to do, at the pace so far; None where that cannot be told."""
        now = time.monotonic()
        if self._end is not None:
            return max(0.0, self._end - now)
        done = self.reached() - self._first
        if self.total is None or done <= 0:
            return None
        return (now - self.started) * max(0.0, self.total - self._first - done) / done


class Board(Protocol):
    """Where work is put up while it is in hand, the outermost first."""

    def begin(self, work: Work) -> None:
        """Put it up."""

    def end(self, work: Work) -> None:
        """Take it down."""


_boards: list[Board] = []
"""The board of this process, if there is one, is the last."""


@contextmanager
def shown_on(board: Board) -> Iterator[None]:
    """Show work on a board while the context lasts."""
    _boards.append(board)
    try:
        yield
    finally:
        _boards.remove(board)


@contextmanager
def work(
    what: str, total: float | None = None, unit: str = "", measure: Callable[[], float] | None = None, done: float = 0.0
) -> Iterator[Work]:
    """Work that is in hand while the context lasts; see :class:`Work`."""
    made, board = Work(what, total, unit, done, measure), _boards[-1] if _boards else None
    if board is None:
        yield made
        return
    board.begin(made)
    try:
        yield made
    finally:
        board.end(made)
