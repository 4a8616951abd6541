"""The menu at the end of a search: choose a trial, save it, talk to it, run more trials, leave.

Control flow only: what the choices do is given by the caller, so that it runs without a model and a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from heretic_ds.errors import SearchFailed, UserError

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord

    Trials = tuple[Sequence[TrialRecord], Sequence[int]]
    """All records, and the indices on the front."""


@dataclass(frozen=True)
class MenuActions:
    """What the menu's choices do. UserError and SearchFailed are shown, and the menu goes on."""

    save: Callable[[int, str], None]
    """Verify the trial of this index and write it to this folder."""
    chat: Callable[[int], None]
    """Talk to the model with the edit of the trial of this index."""
    more_trials: Callable[[int], Trials]
    """Run so many more trials."""
    default_dir: str
    """Folder offered to save to."""


class _Left(Exception):
    """The user left the menu."""


def run_menu(
    actions: MenuActions,
    records: Sequence[TrialRecord],
    front: Sequence[int],
    ask: Callable[[str], str],
    console: Console,
) -> None:
    """Show the front and do what is chosen until the user leaves (also by Ctrl-C or Ctrl-D at a question).

    `front` holds indices of `records`, in the order in which they are shown. `ask` returns what was typed at
    a question and raises EOFError or KeyboardInterrupt.
    """
    menu = _Menu(actions, ask, console)
    with suppress(_Left):
        while True:
            records, front = menu.choose(records, front)


class _Menu:
    def __init__(self, actions: MenuActions, ask: Callable[[str], str], console: Console) -> None:
        self.actions, self.ask, self.console = actions, ask, console

    def choose(self, records: Sequence[TrialRecord], front: Sequence[int]) -> Trials:
        """One round of the main menu; returns the records and the front to go on with."""
        by_index = {record.index: record for record in records}
        shown = [f"trial {index}: {_refusals(by_index[index])}, KL {_kl(by_index[index])}" for index in front]
        number = self.pick([*shown, "run more trials", "leave"], "best trials")
        if number > len(front):
            raise _Left
        if number < len(front):
            self.use(front[number])
            return records, front
        count = self.number("how many more trials", 0, None)  # none for an empty answer too
        return (count and self.attempt(self.actions.more_trials, count)) or (records, front)

    def use(self, index: int) -> None:
        """The menu of one trial."""
        while True:
            number = self.pick(["save the model", "chat with it", "back"], f"trial {index}")
            if number == 2:
                return
            self.attempt((self.save, self.actions.chat)[number], index)

    def save(self, index: int) -> None:
        """Ask for a folder and save there; an empty answer takes the default."""
        folder = self.question(f"folder, or Enter for {self.actions.default_dir}").strip()
        self.actions.save(index, folder or self.actions.default_dir)

    def attempt(self, action: Callable[[int], Any], argument: int) -> Any:
        """What the action returns; a mistake the user can mend is shown, and Ctrl-C comes back to the menu."""
        try:
            return action(argument)
        except (UserError, SearchFailed) as error:
            self.console.print(f"{error}", style="red", markup=False, highlight=False)
        except KeyboardInterrupt:
            self.console.print("stopped", style="yellow")

    def pick(self, choices: Sequence[str], title: str) -> int:
        """Position of the choice whose number, counted from 1, is typed."""
        self.console.print(f"\n{title}", style="bold", highlight=False)
        for position, choice in enumerate(choices, start=1):
            self.console.print(f"{position:>4}  {choice}", markup=False, highlight=False)
        while (number := self.number("number", 1, len(choices))) is None:
            pass
        return number - 1

    def number(self, question: str, low: int, high: int | None) -> int | None:
        """A whole number within the bounds, asked for until there is one; None for an empty answer."""
        while True:
            typed = self.question(question).strip()
            if not typed:
                return None
            if typed.isdecimal() and low <= int(typed) and (high is None or int(typed) <= high):
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


def _refusals(record: TrialRecord) -> str:
    if record.refusals is None:
        return "refusals unknown"
    return f"{record.refusals:g} refusal" + ("" if record.refusals == 1 else "s")


def _kl(record: TrialRecord) -> str:
    return "unknown" if record.kl is None else f"{record.kl:.4g}"
