"""The command heretic-ds, which tells on its way what it is at: what ``kill_and_resume.py`` starts, and ends.

    TOLD=FILE python -m told_command <words of heretic-ds>

Rank 0 appends a line to FILE for each stage that begins or ends, with the moment by the monotonic clock. Nothing else
about the command is changed, and under a launcher it is a rank like any other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from heretic_ds import progress
from heretic_ds.cli import main
from heretic_ds.launching import rank_guard

AFTER = "after "
_open_work = 0


def tell(stage: str) -> None:
    """Append a line, whole: a kill between two of them leaves no half."""
    handle = os.open(os.environ["TOLD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{time.monotonic():.4f} {stage}\n".encode())
    os.close(handle)


def telling_of_work() -> None:
    """Have the outermost work in hand told of from now on."""
    work = progress.work

    @contextmanager
    def told(what: str, *given: Any, **more: Any) -> Iterator[progress.Work]:
        global _open_work
        outermost, _open_work = _open_work == 0, _open_work + 1
        if outermost:
            tell(what)
        try:
            with work(what, *given, **more) as made:
                yield made
        finally:
            _open_work -= 1
            if outermost:
                tell(AFTER + what)

    progress.work = told


def run(words: Sequence[str]) -> int:
    """The command that these words are; returns its exit status."""
    tell("start")
    return main(words)


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        telling_of_work()
        sys.exit(rank_guard.run(lambda: run(sys.argv[1:])))
    sys.exit(rank_guard.run(main))
