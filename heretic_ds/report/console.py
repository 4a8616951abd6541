"""Where a run speaks: one console for messages, tables and progress, so that they do not overwrite each other."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.utils
import transformers.utils.logging
from rich.console import Console

from heretic_ds.foreign.text import printable
from heretic_ds.world import World

_WIDTH_OF_FILES = 160


def console_of(world: World) -> Console:
    """Standard output, where the rank that decides speaks and the others are silent.

    In a file or a pipe nobody knows the width of, tables are wide rather than folded.
    """
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    return Console(file=sys.stdout, width=width, quiet=not world.decides)


def no_bars_without_a_terminal(world: World) -> None:
    """Keep the progress bars of libraries off standard error where it is a file or a pipe, and on all ranks but one."""
    if sys.stderr.isatty() and world.decides:
        return
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read by a library that is imported where it is needed


class _ConsoleHandler(logging.Handler):
    """Messages as plain lines: no markup, no wrapping, so that tools can read them."""

    def __init__(self, target: Console) -> None:
        super().__init__(logging.INFO)
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._target.print(printable(self.format(record)), style=style, markup=False, highlight=False, soft_wrap=True)


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
