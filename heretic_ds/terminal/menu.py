"""The menu at the end of a search: choose a trial, save it, talk to it, run more trials, leave.

Control flow only: what the choices do is given by the caller, so that it runs without a model and a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from heretic_ds.errors import SearchFailed, UserError


class Record(Protocol):
    """What the menu shows of a finished trial."""

    @property
    def index(self) -> int: ...
    @property
    def refusals(self) -> float | None: ...
    @property
    def kl(self) -> float | None: ...


@dataclass(frozen=True)
class MenuActions:
    """What the menu's choices do. UserError and SearchFailed are shown, and the menu goes on."""

    save: Callable[[int, str], None]
    """Verify the trial of this index and write it to this folder."""
    chat: Callable[[int], None]
    """Talk to the model with the edit of the trial of this index."""
    more_trials: Callable[[int], tuple[Sequence[Record], Sequence[int]]]
    """Run so many more trials; returns all records and the indices on the front."""
    default_dir: str
    """Folder offered to save to."""


class _Left(Exception):
    """The user left the menu."""


_NUMBER = re.compile(r"\d+")


def run_menu(
    actions: MenuActions,
    records: Sequence[Record],
    front: Sequence[int],
    ask: Callable[[str], str],
    console: Console,
) -> None:
    """Show the front and do what is chosen until the user leaves (also by Ctrl-C or Ctrl-D at a question).

    `front` holds indices of `records`, in the order in which they are shown. `ask` returns what was typed at
    a question and raises EOFError or KeyboardInterrupt.
    """
    menu = _Menu(actions, ask, console)
    try:
        while True:
            records, front = menu.choose(records, front)
    except _Left:
        return


class _Menu:
    def __init__(self, actions: MenuActions, ask: Callable[[str], str], console: Console) -> None:
        self.actions, self.ask, self.console = actions, ask, console

    def choose(self, records: Sequence[Record], front: Sequence[int]) -> tuple[Sequence[Record], Sequence[int]]:
        """One round of the main menu; returns the records and the front to go on with."""
        by_index = {record.index: record for record in records}
        trials = [by_index[index] for index in front]
        shown = [f"trial {r.index}: {_refusals(r)}, KL {_kl(r)}" for r in trials]
        number = self.pick([*shown, "run more trials", "leave"], "best trials")
        if number < len(trials):
            self.use(trials[number])
        elif number == len(trials):
            return self.more(records, front)
        else:
            raise _Left
        return records, front

    def use(self, trial: Record) -> None:
        """The menu of one trial."""
        while True:
            number = self.pick(["save the model", "chat with it", "back"], f"trial {trial.index}")
            if number == 2:
                return
            self.attempt((self.save, self.actions.chat)[number], trial.index)

    def save(self, index: int) -> None:
        """Ask for a folder and save there; an empty answer takes the default."""
        folder = self.question(f"folder, or Enter for {self.actions.default_dir}").strip()
        self.actions.save(index, folder or self.actions.default_dir)

    def more(self, records: Sequence[Record], front: Sequence[int]) -> tuple[Sequence[Record], Sequence[int]]:
        """Ask how many and run them. An empty answer, or 0, runs none."""
        count = self.number("how many more trials", 0, None)
        if not count:
            return records, front
        result: list[tuple[Sequence[Record], Sequence[int]]] = []
        self.attempt(lambda n: result.append(self.actions.more_trials(n)), count)
        return result[0] if result else (records, front)

    def attempt(self, action: Callable[[int], None], argument: int) -> None:
        """Do it; a mistake the user can mend is shown, and Ctrl-C comes back to the menu."""
        try:
            action(argument)
        except (UserError, SearchFailed) as error:
            self.console.print(f"{error}", style="red", markup=False, highlight=False)
        except KeyboardInterrupt:
            self.console.print("stopped", style="yellow")

    def pick(self, choices: Sequence[str], title: str) -> int:
        """Position of the choice whose number, counted from 1, is typed."""
        self.console.print(f"\n{title}", style="bold", highlight=False)
        for position, choice in enumerate(choices, start=1):
            self.console.print(f"{position:>4}  {choice}", markup=False, highlight=False)
        while True:
            number = self.number("number", 1, len(choices))
            if number is not None:
                return number - 1

    def number(self, question: str, low: int, high: int | None) -> int | None:
        """A whole number within the bounds, asked for until there is one; None for an empty answer."""
        while True:
            typed = self.question(question).strip()
            if not typed:
                return None
            if _NUMBER.fullmatch(typed) and low <= int(typed) and (high is None or int(typed) <= high):
                return int(typed)
            bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
            self.console.print(f"expected a whole number {bounds}", style="yellow", highlight=False)

    def question(self, text: str) -> str:
        """What was typed; leaves the menu at Ctrl-C or Ctrl-D."""
        try:
            return self.ask(f"{text}: ")
        except (EOFError, KeyboardInterrupt):
            self.console.print()
            raise _Left from None


def _refusals(record: Record) -> str:
    if record.refusals is None:
        return "refusals unknown"
    return f"{record.refusals:g} refusal" + ("" if record.refusals == 1 else "s")


def _kl(record: Record) -> str:
    return "unknown" if record.kl is None else f"{record.kl:.4g}"
