"""A command at a pseudo-terminal: keys go in, and what somebody in front of it would see comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte

from tests.conftest import ROOT


class Terminal:
    """`python -m heretic_ds` with these words at a terminal of so many columns and lines; a context manager that kills
    what still runs at its end."""

    def __init__(self, words: list[str], cwd: Path, columns: int = 120, lines: int = 40, **env: str) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=5000, ratio=1)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            # Nobody answers where the cursor is, which prompt_toolkit would wait for.
            given = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **env}
            environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | given
            os.execve(sys.executable, [sys.executable, "-m", "heretic_ds", *words], environment)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._end)

    def send(self, keys: str) -> None:
        """Press keys."""
        os.write(self._end, keys.encode())

    @property
    def text(self) -> str:
        """What scrolled away, and what is on the screen."""
        gone = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self._screen.display])

    @property
    def prompts(self) -> int:
        """How many times something was asked: prompt_toolkit switches bracketed paste on for each."""
        return self.raw.count(b"\x1b[?2004h")

    def wait_until(self, happened: Callable[[Terminal], bool], timeout: float = 120) -> None:
        """Fails where the command ends before that happens, or takes too long."""
        deadline = time.monotonic() + timeout
        while not happened(self):
            assert time.monotonic() < deadline, f"it took too long:\n{self.text}"
            assert self._take(0.05), f"it ended too early:\n{self.text}"

    def asked(self, times: int) -> None:
        """Wait until it asks for the so-manieth time."""
        self.wait_until(lambda terminal: terminal.prompts >= times)

    def end(self, timeout: float = 60) -> int:
        """The exit status, once the command has ended by itself."""
        deadline = time.monotonic() + timeout
        while self._take(0.05):
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _take(self, seconds: float) -> bool:
        """Read what is there; returns whether more may come."""
        if not select.select([self._end], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self._end, 65536)
        except OSError:  # how Linux says that nobody holds the other end any more
            return False
        self.raw += piece
        self._stream.feed(piece)
        return bool(piece)
