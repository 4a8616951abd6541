"""Progress of a search: a row of a table for each trial at a terminal, plain lines anywhere else, and the time left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console

from heretic_ds import progress
from heretic_ds.report.console import is_live, say
from heretic_ds.report.stages import duration
from heretic_ds.report.tables import LEGEND, REFUSALS, TrialTable, trial_line
from heretic_ds.search.pareto import pareto_front
from heretic_ds.search.trials import TrialRecord


class SearchProgress:
    """A context manager that shows each finished trial, and is work in hand: how far the search is.

    The time left is the mean of the finished trials' own seconds, each a share of its pass, times the number
    to come; trials of earlier runs do not count, they may be another machine's. At a terminal trials are rows, of which
    those are marked that no earlier one beats. Where the console is no terminal (a log file, a batch job) each is one
    plain line, which the time left ends.

    Args:
        console: where to write.
        total: number of trials to reach.
        earlier: trials finished by earlier runs.
        prompts: number of target eval prompts.
        scorer: name of the first scorer.
    """

    def __init__(
        self, console: Console, total: int, earlier: Sequence[TrialRecord], prompts: int, scorer: str = REFUSALS
    ) -> None:
        self._console, self._total, self._prompts, self._scorer = console, total, prompts, scorer
        self._records, self._first, self._seconds = list(earlier), len(earlier), 0.0
        self._open = ExitStack()

    def __enter__(self) -> SearchProgress:
        searching = progress.work("trials", self._total, "trials", done=self._first)
        self._work = self._open.enter_context(searching)
        if is_live(self._console) and self._first < self._total:
            self._console.print(LEGEND, self._table().header(), sep="\n", no_wrap=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def seconds_left(self) -> float | None:
        """The estimate; None before the first trial and after the last."""
        finished, to_come = len(self._records) - self._first, self._total - len(self._records)
        return None if finished == 0 or to_come <= 0 else self._seconds / finished * to_come

    def time_left(self) -> str:
        """The estimate, in words; empty where there is none."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"about {duration(seconds)} left"

    def update(self, record: TrialRecord) -> None:
        """Show one more finished trial."""
        self._records.append(record)
        self._seconds += record.seconds
        self._work.advance()
        self._work.expect(self.seconds_left())
        if is_live(self._console):
            on_front = record.index in pareto_front(self._records)
            self._console.print(self._table().row(record, marked=on_front), no_wrap=True)
            return
        left = self.time_left()
        line = trial_line(record, self._total, self._prompts, self._scorer)
        say(self._console, f"{line}  ({len(self._records)} of {self._total} done{', ' + left if left else ''})")

    def _table(self) -> TrialTable:
        """As wide as the terminal is now."""
        return TrialTable(self._console.width, self._total, self._prompts, self._scorer)
