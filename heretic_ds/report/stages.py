"""What is being done right now: one live line with the time left at a terminal, a plain line every few seconds
anywhere else. Nothing here imports torch: it is shown while that is loaded.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from heretic_ds import progress
from heretic_ds.progress import Work
from heretic_ds.report.console import Speaker, is_live, say

STAGES = {
    "load": "loading",
    "prefix": "response prefix",
    "capture": "capture",
    "baseline": "the original's scores",
    "search": "search",
    "verify": "verification",
    "export": "export",
    "final": "final scores",
}
"""What people read of the stages that are timed."""
FIRST_MINUTE, LATER = 2.5, 10.0
"""Seconds of silence after which a line tells how far work is, where there is no terminal: in the first minute of a
stage, and later."""
_A_SECOND = 4
"""Times that the live line is drawn anew: often enough to be seen moving, at about a hundredth of a core."""
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_IN_ASCII = {ord("━"): "-", ord("·"): "-", ord("…"): ".", **{ord(sign): "*" for sign in _SPINNER}}
_LEAST_BAR, _LONGEST_BAR = 8, 40
_SOON = 2.0
"""Seconds of work after which it is worth telling how long the rest takes."""


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def took(work: Work) -> str:
    """How long work has taken: ``3.2 s``, ``3 min 05 s``."""
    seconds = time.monotonic() - work.started
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


class StageProgress:
    """A board on a console; a context manager that puts up what is worked on while it lasts.

    At a terminal the live line stands below all messages, and is gone when nothing is in hand. Elsewhere there is
    no control code, and a line only where nothing else was said for a while.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._works = console, list[Work]()
        self._live: Live | None = None
        self._ticker: _Ticker | None = None
        self._stack = progress.shown_on(self)

    def __enter__(self) -> StageProgress:
        self._stack.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self._hide()

    def begin(self, work: Work) -> None:
        """Put work up; the first shows the line."""
        self._works.append(work)
        if len(self._works) == 1 and not self._console.quiet:
            self._show()

    def end(self, work: Work) -> None:
        """Take work down; the last takes the line with it."""
        self._works.remove(work)
        if not self._works:
            self._hide()

    def _show(self) -> None:
        if is_live(self._console):
            self._live = Live(
                get_renderable=self._drawn, console=self._console, refresh_per_second=_A_SECOND, transient=True
            )
            self._live.start()
        else:
            self._ticker = _Ticker(self._console, self._works)
            self._ticker.start()

    def _hide(self) -> None:
        live, ticker = self._live, self._ticker
        self._live = self._ticker = None  # first, for Ctrl-C may come while a line goes, which goes only once
        if live is not None:
            try:
                live.stop()
            except BaseException:
                self._console.show_cursor(True)
                raise
        if ticker is not None:
            ticker.stop()

    def _drawn(self) -> Text:
        # One column is left free: terminals differ in what they do after the last one.
        line = live_line(list(self._works), self._console.width - 1, time.monotonic())
        if self._console.options.ascii_only:
            line.plain = line.plain.translate(_IN_ASCII)
        return line


@contextmanager
def starting() -> Iterator[None]:
    """Show, at a terminal, that the program is being loaded; the rank that decides alone."""
    if os.environ.get("RANK", "0") != "0" or not sys.stdout.isatty():
        yield
        return
    with StageProgress(Console()), progress.work("loading PyTorch and transformers"):
        yield


class _Ticker(threading.Thread):
    """Tells in lines how far work is, for as long as nobody says anything else."""

    def __init__(self, console: Console, works: Sequence[Work]) -> None:
        super().__init__(name="progress", daemon=True)
        self._console, self._works = console, works
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._begun = self._told = time.monotonic()

    def run(self) -> None:
        while not self._ended.wait(self._pause()):
            with self._lock:
                if self._ended.is_set() or self._pause() > 0:
                    continue
                if line := plain_line(list(self._works), time.monotonic()):
                    say(self._console, line)
                self._told = time.monotonic()

    def _pause(self) -> float:
        now = time.monotonic()
        said = self._console.said_at if isinstance(self._console, Speaker) else 0.0
        every = FIRST_MINUTE if now - self._begun < 60 else LATER
        return max(0.0, max(self._told, said) + every - now)

    def stop(self) -> None:
        """Say nothing from now on."""
        with self._lock:
            self._ended.set()


def plain_line(works: Sequence[Work], now: float) -> str:
    """``capture: residuals, 120 of 400 prompts, about 12 s left (5 s so far)``; empty where nothing is in hand."""
    if not works:
        return ""
    counted, inner = _counted(works), _inner(works)
    parts = [inner] if inner else []
    if counted is not None:
        unit = "" if counted.unit == "bytes" else f" {counted.unit}"
        parts.append(f"{_amount(counted, ' of ')}{unit}".rstrip())
        parts += [left] if (left := _left(counted, now)) else []
    told = f": {', '.join(parts)}" if parts else ""
    return f"{works[0].what}{told} ({duration(now - works[0].started)} so far)"


def live_line(works: Sequence[Work], width: int, now: float) -> Text:
    """The same with a bar, in at most so many columns: what does not fit is left out, the bar first."""
    if not works:
        return Text()
    counted, inner = _counted(works), _inner(works)
    head = Text.assemble((_SPINNER[int(now * 8) % len(_SPINNER)], "cyan"), " ", (works[0].what, "bold"))
    pieces = {
        "amount": Text(_amount(counted, "/") if counted else "", "green"),
        "left": Text(_left(counted, now) if counted else "", "cyan"),
        "clock": Text(_clock(now - works[0].started), "dim"),
        "inner": Text(f"· {inner}" if inner else "", "dim"),
    }
    room = width - head.cell_len
    for name, piece in pieces.items():  # the most telling first
        if piece.cell_len + 1 > room:
            pieces[name] = Text()
        elif piece.plain:
            room -= piece.cell_len + 1
    bar = _bar(counted, min(room - 1, _LONGEST_BAR)) if counted is not None and room > _LEAST_BAR else Text()
    shown = [head, pieces["inner"], bar, pieces["amount"], pieces["clock"], pieces["left"]]
    line = Text(" ", no_wrap=True).join(piece for piece in shown if piece.plain)
    line.truncate(width, overflow="ellipsis")
    return line


def _counted(works: Sequence[Work]) -> Work | None:
    """The outermost work of which is known how much there is."""
    return next((work for work in works if work.total), None)


def _inner(works: Sequence[Work]) -> str:
    """What the innermost work is, and how far where that is not told already: ``answers 45 %``."""
    work = works[-1]
    if work is works[0]:
        return ""
    if not work.total or work is _counted(works):
        return "" if work.what == work.unit else work.what  # else it is told with the amount
    return f"{work.what} {_share(work):.0%}".replace("%", " %")


def _share(work: Work) -> float:
    return min(1.0, work.reached() / work.total) if work.total else 1.0


def _amount(work: Work, of: str) -> str:
    """``120/400``, or of bytes ``12.3/92.0 MB``."""
    done, total = work.reached(), work.total or 0
    if work.unit == "bytes":
        unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
        return f"{done / size:.1f}{of}{total / size:.1f} {unit}"
    return f"{done:.0f}{of}{total:.0f}"


def _left(work: Work, now: float) -> str:
    seconds = work.seconds_left()
    if seconds is None or (now - work.started < _SOON and not work.expects):
        return ""
    return f"about {duration(seconds)} left"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _bar(work: Work, width: int) -> Text:
    filled = round(width * _share(work))
    return Text.assemble(("━" * filled, "green"), ("━" * (width - filled), "bright_black"))
