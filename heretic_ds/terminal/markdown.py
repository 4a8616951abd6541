"""Answers as Markdown: what is finished is printed for good, what still grows is drawn anew as it does."""

from __future__ import annotations

import time
from types import TracebackType

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from heretic_ds.terminal.text import printable

# Without HTML, which would vanish: <think> is text to a reader.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")

_SECONDS_BETWEEN_DRAWINGS = 0.08
_SPARE_LINES = 2


def as_markdown(text: str) -> Markdown:
    """A model's text to be printed by rich.

    Lines end where the model ended them, addresses of links are shown rather than hidden behind them, and control
    characters are made visible.
    """
    shown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    shown.parsed = _PARSER.parse(printable(text))
    for token in shown.parsed:
        for inline in token.children or ():
            inline.content = printable(inline.content)  # entities, such as &#x202e;, are characters by now
            if inline.type == "softbreak":
                inline.type = "hardbreak"
    return shown


def finished_blocks(text: str) -> tuple[str, str]:
    """Markdown that grows, cut before its last block: what will not change any more, and the rest."""
    whole_lines = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in _PARSER.parse(whole_lines) if token.level == 0 and token.map is not None]
    if len(starts) < 2:
        return "", text
    lines = text.split("\n")
    return "\n".join(lines[: starts[-1]]), "\n".join(lines[starts[-1] :])


class MarkdownStream:
    """Shows an answer at a terminal while it grows: a context manager whose :meth:`write` takes its pieces.

    Blocks that are finished scroll away as ordinary output. Only the last one is drawn anew, and of one that is higher
    than the screen the last lines. With `keep` false nothing stays once the context ends.
    """

    def __init__(self, console: Console, keep: bool = True) -> None:
        self._console, self._keep = console, keep
        self._growing, self._printed, self._drawn = "", False, 0.0
        waiting = Text("…", style="dim")
        self._live = Live(waiting, console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def __enter__(self) -> MarkdownStream:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(Text(""))
        self._live.stop()
        if self._keep and self._growing.strip():
            self._print(self._growing, first=not self._printed)

    def write(self, text: str) -> None:
        """Show one more piece."""
        self._growing += text
        if self._keep:
            done, rest = finished_blocks(self._growing)
            if done.strip():
                first, self._growing, self._printed = not self._printed, rest, True
                self._live.update(self._view(), refresh=True)  # else what is finished would stay below itself
                self._print(done, first)
        if (now := time.monotonic()) - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._live.update(self._view(), refresh=True)

    def _view(self) -> RenderableType:
        growing = _LastLines(as_markdown(self._growing))
        return Group("", growing) if self._printed else growing

    def _print(self, block: str, first: bool) -> None:
        if not first:
            self._console.print()
        self._console.print(as_markdown(block))


class _LastLines:
    """As many of the last lines of something as the screen has room for."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - _SPARE_LINES) :]:
            yield from line
            yield Segment.line()
