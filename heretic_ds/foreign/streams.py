"""Standard streams that take nothing, or are not there: a full disk behind ``> log``, a reader that has gone, ``>&-``.

What a run has to say stands in its log too. That nobody takes it elsewhere is no reason to end hours of work.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Lossy(io.FileIO):
    """A file that is written as far as it takes anything; the rest is gone."""

    def write(self, data: Any, /) -> int:
        """Bytes taken, or lost."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_standard_streams() -> None:
    """Give this process streams whose failures end nothing. Those that somebody has replaced stay as they are."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: else the next file that is opened would be taken for it
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
        elif number and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            setattr(sys, name, _lossy(stream, number))


def _lossy(stream: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
