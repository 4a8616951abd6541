"""Ctrl-C that is not lost, whatever Python is at when it comes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

_AGAIN_SECONDS = 0.05
"""Long enough for the callback that swallowed an interrupt to be over."""


@contextmanager
def interrupts_heeded() -> Iterator[None]:
    """While open, a Ctrl-C that falls into a callback of a weak reference or into a finalizer is sent once more.

    Python ignores exceptions there, KeyboardInterrupt as well, and says so on standard error: a model that is released
    and modules that are imported run many such callbacks, and a run would go on as if nobody had asked it to end.
    """
    earlier = sys.unraisablehook

    def heed(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            earlier(ignored)
            return
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        timer = Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = heed
    try:
        yield
    finally:
        sys.unraisablehook = earlier


def was_interrupted(error: BaseException | None) -> bool:
    """Whether an error was raised while an interrupt was on its way out: by what was half closed then."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
