"""A command in a pseudo-terminal, as somebody at a screen of some columns sees it: for tests and `docs/screens`."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parents[1]
HERETIC = (sys.executable, "-m", "heretic_ds")
_HISTORY = 5000


def _take_terminal() -> None:
    """Make standard input the controlling terminal of a new session, so that keys such as Ctrl-C are signals."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A command and the screen that it writes to; a context manager, at whose end the command is gone."""

    def __init__(
        self, words: Sequence[str], cwd: Path, columns: int = 80, lines: int = 40, env: dict[str, str] | None = None
    ) -> None:
        self.columns = columns
        self.written: list[tuple[float, str]] = []
        """What was written, with the seconds since the start."""
        self.ended_at = 0.0
        self._screen = pyte.HistoryScreen(columns, lines, history=_HISTORY, ratio=0.5)
        self._stream, self._started = pyte.Stream(self._screen), time.monotonic()
        self._handle, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(env or {})}
        self._process = subprocess.Popen(
            list(words), cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._handle)

    @property
    def shown(self) -> list[str]:
        """All lines that were on the screen, those that have left it at the top first, without trailing space."""
        columns = range(self.columns)
        gone = ["".join(line[column].data for column in columns) for line in self._screen.history.top]
        lines = [line.rstrip() for line in (*gone, *self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        """Everything that was written, control codes included."""
        return "".join(text for _, text in self.written)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._handle, keys.encode())

    def wait_until(self, happened: Callable[[Terminal], bool], timeout: float = 300) -> None:
        """Read what is written until something has happened; fails where the command ends first, or takes too long."""
        deadline = time.monotonic() + timeout
        while not happened(self):
            assert self._read(), f"it ended too early:\n{self.text}"
            assert time.monotonic() < deadline, f"it took too long:\n{self.text}"

    def end(self, timeout: float = 300) -> int:
        """Read until the command ends; returns its exit status."""
        deadline = time.monotonic() + timeout
        while self._read():
            assert time.monotonic() < deadline, f"it took too long:\n{self.text}"
        self.ended_at = time.monotonic() - self._started
        return self._process.wait()

    def longest_silence(self) -> tuple[float, str]:
        """The most seconds without output, and the last line before them."""
        times = [0.0, *(at for at, _ in self.written), self.ended_at]
        gaps = [later - sooner for sooner, later in pairwise(times)]
        place = max(range(len(gaps)), key=gaps.__getitem__)
        return gaps[place], "".join(text for _, text in self.written[:place])[-200:]

    def _read(self) -> bool:
        """Take what is there, or comes within a moment; False where the command has closed its end."""
        ready, _, _ = select.select([self._handle], [], [], 0.1)
        if not ready:
            return True
        try:
            data = os.read(self._handle, 65536)
        except OSError:  # Linux tells so that nobody holds the other end any more
            data = b""
        text = data.decode(errors="replace")
        if text:
            self.written.append((time.monotonic() - self._started, text))
            self._stream.feed(text)
        return bool(data)
