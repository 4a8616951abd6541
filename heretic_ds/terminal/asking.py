"""How the menu asks: by arrow keys at a terminal, line by line from anything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output
    from questionary import Question


class Asker(Protocol):
    """Asks questions; every one has a default, which is said and taken by Enter alone. All raise EOFError at Ctrl-D
    and KeyboardInterrupt at Ctrl-C."""

    def pick(self, title: str, choices: Sequence[str], default: int) -> int:
        """Position of one of the choices, which are shown as numbers from 1."""
        ...

    def number(self, question: str, default: int) -> int:
        """A whole number of at least 0."""
        ...

    def folder(self, question: str, default: str) -> str:
        """A folder's path, as it was typed."""
        ...

    def text(self, question: str, default: str) -> str:
        """A word or a line, as it was typed."""
        ...


def at_a_terminal() -> bool:
    """Whether keys can be read one by one, and the screen be drawn on."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def asker_at(console: Console) -> Asker:
    """Whoever asks best where this process reads and writes."""
    return Keys() if at_a_terminal() else Lines(partial(console.input, markup=False, emoji=False), console)


class Lines:
    """Asks line by line: for pipes, and for terminals that cannot move their cursor.

    `ask` returns what was typed at a question, and raises EOFError or KeyboardInterrupt.
    """

    def __init__(self, ask: Callable[[str], str], console: Console) -> None:
        self.ask, self.console = ask, console

    def pick(self, title: str, choices: Sequence[str], default: int) -> int:
        self.console.print(f"\n{title}", style="bold", highlight=False, markup=False)
        for position, choice in enumerate(choices, start=1):
            self.console.print(f"{position:>4}  {choice}", markup=False, highlight=False)
        return self._whole("number", default + 1, 1, len(choices)) - 1

    def number(self, question: str, default: int) -> int:
        return self._whole(question, default, 0, None)

    def folder(self, question: str, default: str) -> str:
        return self.text(question, default)

    def text(self, question: str, default: str) -> str:
        return self.ask(f"{question}, or Enter for {default}: ").strip() or default

    def _whole(self, question: str, default: int, low: int, high: int | None) -> int:
        """A whole number within the bounds, asked for until there is one."""
        while typed := self.ask(f"{question}, or Enter for {default}: ").strip():
            if _is_whole(typed, low, high):
                return int(typed)
            self.console.print(_expected(low, high), style="yellow", highlight=False)
        return default


class Keys:
    """Asks with arrow keys, numbers, and completion of paths. `input` and `output` stand for the terminal in tests."""

    def __init__(self, input: Input | None = None, output: Output | None = None) -> None:
        self._ends: dict[str, Any] = {"input": input, "output": output}

    def pick(self, title: str, choices: Sequence[str], default: int) -> int:
        from questionary import Choice, select

        rows = [Choice(f"{place:>2}  {choice}", value=place) for place, choice in enumerate(choices, start=1)]
        how = f"(arrow keys or a number; Enter: {default + 1})"
        question = select(
            title, rows, default=rows[default], qmark="", pointer=">", instruction=how, use_jk_keys=False, **self._ends
        )
        _take_numbers(question, len(rows))
        return int(question.unsafe_ask()) - 1

    def number(self, question: str, default: int) -> int:
        from questionary import text

        def verdict(typed: str) -> bool | str:
            return not typed.strip() or _is_whole(typed.strip(), 0, None) or _expected(0, None)

        asked = text(f"{question} (Enter: {default})", qmark="", validate=verdict, **self._ends)
        return int(asked.unsafe_ask().strip() or default)

    def folder(self, question: str, default: str) -> str:
        from questionary import path

        asked = path(f"{question} (Tab completes; Enter: {default})", qmark="", only_directories=True, **self._ends)
        return str(asked.unsafe_ask()).strip() or default

    def text(self, question: str, default: str) -> str:
        from questionary import text

        return str(text(f"{question} (Enter: {default})", qmark="", **self._ends).unsafe_ask()).strip() or default


def _take_numbers(question: Question, count: int) -> None:
    """Let typed digits point to the choice of that number, and Ctrl-D leave, neither of which `select` knows."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
    from questionary.prompts.common import InquirerControl

    keys, typed = KeyBindings(), ""
    controls = question.application.layout.find_all_controls()
    [control] = [found for found in controls if isinstance(found, InquirerControl)]

    def point(event: KeyPressEvent) -> None:
        nonlocal typed
        goes_on = typed and control.pointed_at == int(typed) - 1  # no arrow key was pressed in between
        for number in ([typed + event.data] if goes_on else []) + [event.data]:
            if _is_whole(number, 1, count):
                typed, control.pointed_at = number, int(number) - 1
                return

    for digit in "0123456789":
        keys.add(digit, eager=True)(point)

    @keys.add("c-d", eager=True)
    def _leave(event: KeyPressEvent) -> None:
        event.app.exit(exception=EOFError, style="class:aborting")

    given = question.application.key_bindings
    question.application.key_bindings = merge_key_bindings([*([given] if given else []), keys])


def _is_whole(typed: str, low: int, high: int | None) -> bool:
    return typed.isdecimal() and low <= int(typed) and (high is None or int(typed) <= high)


def _expected(low: int, high: int | None) -> str:
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    return f"expected a whole number {bounds}"
