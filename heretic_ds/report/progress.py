"""Progress of a search: a bar with the time left at a terminal, plain lines anywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from heretic_ds.report.tables import REFUSALS, trial_line
from heretic_ds.search.trials import TrialRecord


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class SearchProgress:
    """A context manager that shows each finished trial in a line and how far the search is.

    The time left is the mean of the finished trials' own seconds, each a share of its pass, times the number
    to come; trials of earlier runs do not count, they may be another machine's. Where the console is no
    terminal (a log file, a batch job) there is no bar and no control code: the time left ends each line.

    Args:
        console: where to write.
        total: number of trials to reach.
        done: trials finished by earlier runs.
        prompts: number of target eval prompts.
        scorer: name of the first scorer.
    """

    def __init__(self, console: Console, total: int, done: int, prompts: int, scorer: str = REFUSALS) -> None:
        self._console, self._total, self._prompts, self._scorer = console, total, prompts, scorer
        self._first = self._done = done
        self._seconds = 0.0
        columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}")
        self._bar = Progress(*columns, left, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("search", total=total, completed=done, left="")

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def time_left(self) -> str:
        """The estimate, in words; empty before the first trial and after the last."""
        finished, to_come = self._done - self._first, self._total - self._done
        if finished == 0 or to_come <= 0:
            return ""
        return f"about {duration(self._seconds / finished * to_come)} left"

    def update(self, record: TrialRecord) -> None:
        """Show one more finished trial."""
        self._done += 1
        self._seconds += record.seconds
        line, left = trial_line(record, self._total, self._prompts, self._scorer), self.time_left()
        self._bar.update(self._task, completed=self._done, left=left)
        if self._bar.disable:
            line += f"  ({self._done} of {self._total} done{', ' + left if left else ''})"
        # Neither markup nor highlighting nor wrapping: a trial stays one line that tools can read.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
