"""How a chat reads and shows: plainly, or with keys and Markdown at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from heretic_ds.terminal.asking import at_a_terminal
from heretic_ds.terminal.markdown import MarkdownStream, as_markdown
from heretic_ds.terminal.text import Write, printable

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

Answering = Callable[[Write], tuple[str, bool]]
"""Answers, passing the answer on as it grows; returns it, and whether it was stopped."""

SIDE_BY_SIDE = 80
"""Columns from which on two answers stand beside each other."""


class Face(Protocol):
    """What a chat shows itself by."""

    def read(self) -> str:
        """The next message. Raises EOFError at its end and KeyboardInterrupt at Ctrl-C."""
        ...

    def say(self, text: str) -> None:
        """Something that the chat itself has to say."""
        ...

    def list(self, entries: Mapping[str, str]) -> None:
        """What the chat has to say of several things, by their names."""
        ...

    def answer(self, answering: Answering) -> str:
        """Show an answer while it is given; returns it as it is."""
        ...

    def compare(self, answering: Answering, other: str, titles: tuple[str, str]) -> None:
        """Show an answer beside another one that is there already, each under its title."""
        ...


def read_line(prompt: str) -> str:
    """A line from the terminal, asked for with `prompt`, or from a pipe, unasked. EOFError at its end."""
    return input(prompt if sys.stdin.isatty() else "")


write_text: Write = partial(print, end="", flush=True)
"""Writes to standard output, at once."""


class PlainFace:
    """Lines in, text out: for pipes, and for terminals that cannot move their cursor."""

    def __init__(self, read: Callable[[str], str] = read_line, write: Write = write_text) -> None:
        self._read, self._write = read, write

    def read(self) -> str:
        try:
            return self._read("\n> ")
        except (EOFError, KeyboardInterrupt):
            self._write("\n")
            raise

    def say(self, text: str) -> None:
        self._write(f"[{printable(text)}]\n")

    def list(self, entries: Mapping[str, str]) -> None:
        for name, what in entries.items():
            self._write(printable(f"{name:<10} {what}\n"))

    def answer(self, answering: Answering) -> str:
        text, stopped = answering(lambda piece: self._write(printable(piece)))
        self._write(" [stopped]\n" if stopped else "\n")
        return text

    def compare(self, answering: Answering, other: str, titles: tuple[str, str]) -> None:
        self._write(f"--- {printable(titles[0])} ---\n")
        self.answer(answering)
        self._write(f"--- {printable(titles[1])} ---\n{printable(other)}\n")


class TerminalFace:
    """A line with history and paste, and answers as Markdown."""

    def __init__(self, console: Console, session: PromptSession[str]) -> None:
        self._console, self._session = console, session

    def read(self) -> str:
        self._console.print()
        return str(self._session.prompt("> "))

    def say(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False, highlight=False)

    def list(self, entries: Mapping[str, str]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, what in entries.items():
            table.add_row(Text(printable(name), no_wrap=True), Text(printable(what)), style="dim")
        self._console.print(table)

    def answer(self, answering: Answering) -> str:
        with MarkdownStream(self._console) as stream:
            text, stopped = answering(stream.write)
        self._told(stopped)
        return text

    def compare(self, answering: Answering, other: str, titles: tuple[str, str]) -> None:
        with MarkdownStream(self._console, keep=False) as stream:
            text, stopped = answering(stream.write)
        show_both(self._console, titles, (text, other))
        self._told(stopped)

    def _told(self, stopped: bool) -> None:
        if stopped:
            self.say("stopped")


def show_both(console: Console, titles: Sequence[str], answers: Sequence[str]) -> None:
    """Answers beside each other, or where the terminal is narrow below each other, each under its title."""
    headings = [Text(printable(title), style="bold") for title in titles]
    if console.width < SIDE_BY_SIDE:
        for heading, answer in zip(headings, answers, strict=True):
            console.print(Rule(heading, align="left", style="dim"))
            console.print(as_markdown(answer))
        return
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, ratio=1)
    table.add_row(*map(as_markdown, answers))
    console.print(table)


def face_at(console: Console, commands: Sequence[str]) -> Face:
    """What a chat shows itself by where this process reads and writes."""
    if not at_a_terminal():
        return PlainFace()
    from heretic_ds.terminal.session import chat_session, open_history

    return TerminalFace(console, chat_session(commands, open_history()))
