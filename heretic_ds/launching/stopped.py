"""Ranks that somebody has stopped (SIGSTOP), for which the others would wait as long as a collective allows."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import psutil

TOLD_SECONDS, ENDED_SECONDS = 10.0, 300.0
"""After so long a rank that is stopped while another is not is told of, and after so long all are ended."""
_LONGEST_LOOK = 1.0
"""Longest time between two looks that is counted: what is longer, this process was stopped too."""


class StoppedRanks:
    """What one look after another tells of ranks that stand still.

    Where all of them are stopped nobody waits: a batch system, or a person, has put the job aside.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._looked = time.monotonic()

    def look(self, ranks: Mapping[int, psutil.Process], elsewhere: bool) -> int | None:
        """The rank that has kept others waiting for too long; None where there is none.

        ``ranks`` are those that run here, by number; ``elsewhere`` says whether there are more on other nodes.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK), now
        stopped = [number for number, process in ranks.items() if _is_stopped(process)]
        if len(stopped) == len(ranks) and not elsewhere:
            stopped = []
        before, self._seconds = self._seconds, {number: self._seconds.get(number, 0.0) + passed for number in stopped}
        for number, seconds in self._seconds.items():
            if before.get(number, 0.0) < TOLD_SECONDS <= seconds:
                _tell(number, ranks[number].pid)
            if seconds >= ENDED_SECONDS:
                return number
        return None


def why_ended(number: int) -> str:
    """What is said where a rank was given up."""
    return (
        f"heretic-ds: rank {number} was stopped for {ENDED_SECONDS:.0f} s while others waited for it, so all ranks "
        "were ended; the same command goes on"
    )


def _tell(number: int, pid: int) -> None:
    print(
        f"heretic-ds: rank {number} is stopped, and the others wait for it: kill -CONT {pid} lets it go on, else all "
        f"ranks are ended in {ENDED_SECONDS - TOLD_SECONDS:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _is_stopped(process: psutil.Process) -> bool:
    """Whether it stands still until it is told to go on; where a debugger holds it, somebody looks after it."""
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
