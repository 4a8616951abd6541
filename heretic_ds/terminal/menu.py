"""The menu at the end of a search: choose a trial, save it, talk to it, upload it, run more trials, leave.

Control flow only: what the choices do and how they are asked for is given by the caller, so that it runs without a
model and a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from heretic_ds.errors import SearchFailed, UserError
from heretic_ds.terminal.asking import Asker
from heretic_ds.terminal.front import REFUSALS, about_the_rule, rule_choice, trial_label

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord

    Trials = tuple[Sequence[TrialRecord], Sequence[int]]
    """All records, and the indices on the front."""

MORE_TRIALS = 20
"""How many more trials are offered."""


@dataclass(frozen=True)
class MenuActions:
    """What the menu's choices do. UserError and SearchFailed are shown, and the menu goes on."""

    save: Callable[[int, str], None]
    """Verify the trial of this index and write it to this folder."""
    chat: Callable[[int], None]
    """Talk to the model with the edit of the trial of this index."""
    more_trials: Callable[[int], Trials]
    """Run so many more trials."""
    upload: Callable[[int, str, str, bool], None]
    """Save the trial of this index in this folder, and upload it to this repository, private or not."""
    default_dir: str
    """Folder offered to save to."""
    default_repo: str
    """Repository offered to upload to."""
    private: bool = True
    """Whether a repository is made private unless the user says otherwise."""
    max_kl: float = math.inf
    """Largest KL (nats) of the trial that a run without a menu would choose."""
    scorer: str = REFUSALS
    """Name of the scorer that the search minimises."""


class _Left(Exception):
    """The user left the menu."""


def run_menu(
    actions: MenuActions,
    records: Sequence[TrialRecord],
    front: Sequence[int],
    asker: Asker,
    console: Console,
) -> None:
    """Show the front and do what is chosen until the user leaves (also by Ctrl-C or Ctrl-D at a question).

    `front` holds indices of `records`, in the order in which they are shown.
    """
    menu = _Menu(actions, asker, console)
    with suppress(_Left):
        while True:
            records, front = menu.choose(records, front)


class _Menu:
    def __init__(self, actions: MenuActions, asker: Asker, console: Console) -> None:
        self.actions, self.asker, self.console = actions, asker, console

    def choose(self, records: Sequence[TrialRecord], front: Sequence[int]) -> Trials:
        """One round of the main menu; returns the records and the front to go on with."""
        by_index, max_kl = {record.index: record for record in records}, self.actions.max_kl
        rule = rule_choice(records, max_kl)
        shown = [
            trial_label(by_index[index], self.actions.scorer) + (" (by the rule)" if index == rule else "")
            for index in front
        ]
        if told := about_the_rule(records, max_kl, self.actions.scorer):
            self.console.print(f"\n{told}", markup=False, highlight=False)
        default = front.index(rule) if rule in front else len(front)
        number = self.pick([*shown, "run more trials", "leave"], "best trials", default)
        if number > len(front):
            raise _Left
        if number < len(front):
            self.use(front[number])
            return records, front
        count = self.ask(self.asker.number, "how many more trials", MORE_TRIALS)
        return (count and self.attempt(self.actions.more_trials, count)) or (records, front)

    def use(self, index: int) -> None:
        """The menu of one trial."""
        while True:
            choices = ["save the model", "chat with it", "upload it to the hub", "back"]
            number = self.pick(choices, f"trial {index}", 0)
            if number == 3:
                return
            self.attempt((self.save, self.actions.chat, self.upload)[number], index)

    def save(self, index: int) -> None:
        """Ask for a folder and save there."""
        self.actions.save(index, self.ask(self.asker.folder, "folder", self.actions.default_dir))

    def upload(self, index: int) -> None:
        """Ask for a folder and a repository; save there, and upload that."""
        folder = self.ask(self.asker.folder, "folder", self.actions.default_dir)
        repository = self.ask(self.asker.text, "repository", self.actions.default_repo)
        seen = ["private: you alone can see it", "public: everybody can see it"]
        private = self.pick(seen, "a new repository is", 0 if self.actions.private else 1) == 0
        self.actions.upload(index, folder, repository, private)

    def attempt(self, action: Callable[[int], Any], argument: int) -> Any:
        """What the action returns; a mistake the user can mend is shown, and Ctrl-C comes back to the menu."""
        try:
            return action(argument)
        except (UserError, SearchFailed) as error:
            self.console.print(f"{error}", style="red", markup=False, highlight=False)
        except KeyboardInterrupt:
            self.console.print("stopped", style="yellow")

    def pick(self, choices: Sequence[str], title: str, default: int) -> int:
        """Position of a choice."""
        return int(self.ask(self.asker.pick, title, choices, default))

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """The answer to a question; leaves the menu at Ctrl-C or Ctrl-D."""
        try:
            return question(*arguments)
        except (EOFError, KeyboardInterrupt):
            self.console.print()
            raise _Left from None
