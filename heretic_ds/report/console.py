"""Where a run speaks: one console for messages, tables and progress, so that they do not overwrite each other."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from heretic_ds.foreign.text import printable

if TYPE_CHECKING:
    from heretic_ds.world import World

WIDTH_OF_FILES = 160
"""Columns where output goes to a file or a pipe, whose width nobody knows: tables are wide there rather than folded."""


class Speaker(Console):
    """A console that knows when it last said something."""

    said_at = 0.0
    """By the monotonic clock."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As any console does."""
        super().print(*objects, **options)
        self.said_at = time.monotonic()


def console_of(world: World) -> Speaker:
    """Standard output, where the rank that decides speaks and the others are silent."""
    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    return Speaker(file=sys.stdout, width=width, quiet=not world.decides)


def is_live(console: Console) -> bool:
    """Whether there is a terminal on which lines can be drawn anew."""
    return console.is_terminal and not console.is_dumb_terminal


def say(console: Console, text: str, style: str | None = None) -> None:
    """:func:`printable` text without markup or highlighting: folded between words at a terminal, elsewhere as one line
    that tools can read."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=not is_live(console))


class _ConsoleHandler(logging.Handler):
    """Messages as :func:`say` has them; those marked ``extra={"console": False}`` are for ``run.log`` alone."""

    def __init__(self, target: Console) -> None:
        super().__init__(logging.INFO)
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "console", True):
            say(self._target, self.format(record), "yellow" if record.levelno >= logging.WARNING else None)


@contextmanager
def messages_to(target: Console) -> Iterator[Console]:
    """Show this package's messages on a console while the context lasts."""
    logger = logging.getLogger("heretic_ds")
    handler, level, propagate = _ConsoleHandler(target), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a root handler of somebody else's would say everything twice
    try:
        yield target
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class EarlierMessages(logging.Handler):
    """What is said before there is a run folder, for its log to begin with; a context manager, until whose end at the
    latest it listens."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Remember it."""
        self.records.append(record)

    def end(self) -> None:
        """Listen no longer, and forget. Harmless when called again."""
        self._logger.removeHandler(self)
        self.records = []

    def __enter__(self) -> EarlierMessages:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
