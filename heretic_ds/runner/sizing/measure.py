"""Measuring on samples: the memory that rows take, and how many of them are done fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from heretic_ds.memory import peak_of, release_memory
from heretic_ds.runner.comm import ALONE, Comm
from heretic_ds.runner.sizing.ladder import Ladder

SAFE_SHARE = 0.5
"""Part of the free memory that a batch may fill: other ranks, and other programs, take from the same."""
SHORTEST = 1e-6
"""Seconds that any pass takes at least."""
_FEW = 4
"""Rows of the larger of two batches from whose memory that of others is told."""
_FIRST = 4
"""Rows of the first batch that is timed: that fewer are faster is rare, and seen where more are no gain."""
_MOST_RUNS, _LONG_ENOUGH = 2, 0.03
"""Runs by which a batch size is measured, and undisturbed seconds after which there have been enough."""


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes that passes take beside the weights, by the number of their rows."""

    first: float
    """Of a pass of one row."""
    row: float
    """Of each more."""

    @classmethod
    def of_peaks(cls, peaks: dict[int, int | None]) -> WorkingMemory | None:
        """By the peaks of two batches, given by their rows; None where they do not tell it."""
        (few, low), (more, high) = min(peaks.items()), max(peaks.items())
        if low is None or high is None or high <= low:
            return None
        row = (high - low) / (more - few)
        return cls(low - row * (few - 1), row)

    def of(self, rows: int) -> int:
        """Of so many rows."""
        return math.ceil(self.first + self.row * (rows - 1))

    def rows_within(self, free: float) -> int:
        """Rows, at least one, that may be given so many free bytes."""
        return max(1, int(1 + (SAFE_SHARE * free - self.first) / self.row))


def working_memory(run: Callable[[int], object], most: int, device: torch.device) -> WorkingMemory | None:
    """The memory of passes, by the peaks of two small batches; ``run(n)`` does a sample of the work on n rows.

    None where there is no way to measure it, or where only one row could ever be in a batch.
    """
    few, more = 1, min(_FEW, most)
    run(few)  # the first call allocates what all later ones share
    if more == few:
        return None
    return WorkingMemory.of_peaks({rows: peak_of(lambda: run(rows), device) for rows in (few, more)})  # noqa: B023


def measure_batch_size(
    run: Callable[[int], bool],
    most: int,
    comm: Comm = ALONE,
    clock: Callable[[], float] = time.perf_counter,
    amount: Callable[[int], float] = float,
    warm: bool = False,
) -> int:
    """Rows per batch with the best measured throughput, up to ``most``; 0 where memory does not hold one row.

    ``run(n)`` does a sample of the phase's work on n rows, which comes to ``amount(n)``, and says whether memory held
    it. On a CPU ``clock`` is the processor's, since other programs' work should not count. All ranks come to one size:
    that of the slowest, which memory held on each. Which sizes are tried says :class:`Ladder`.
    Unless such samples were run before (``warm``), a first one pays for what is set up lazily.
    """

    def seconds(size: int) -> float:
        started = clock()
        if not run(size):
            release_memory()
            return comm.most(math.inf)
        return comm.most(max(clock() - started, SHORTEST))

    def best_of_some(size: int) -> float:
        """The least of several runs, of which there are fewer the longer they take."""
        found: list[float] = []
        while len(found) < _MOST_RUNS and len(found) * min(found, default=0.0) < _LONG_ENOUGH:
            found.append(seconds(size))
        return min(found)

    if not warm and math.isinf(seconds(1)):
        return 0
    ladder = Ladder(most, _FIRST)
    while (size := ladder.next) is not None:
        work = comm.least(amount(size))
        ladder.note(size, work, best_of_some(size))
    return ladder.best
