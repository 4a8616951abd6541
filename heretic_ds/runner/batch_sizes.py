"""How many rows a batch has: as many as memory holds and the best throughput asks for, both found by measuring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heretic_ds.prompts import TokenRows
from heretic_ds.runner.headroom import rows_that_fit
from heretic_ds.runner.memory import is_out_of_memory, lend_spares, release_memory, too_large

MOST_ROWS = 512
"""Largest batch that is tried."""
PROBE_TOKENS = 16
"""Answer tokens per row while the batch size for generation is measured."""
_SHARE_COMPUTED = 0.5
"""About how much of a pass over prompts is left where it starts from what is known."""
_GAIN = 1.02
"""By how much a larger batch has to be faster to be worth its memory."""
_MOST_RUNS, _LONG_ENOUGH = 5, 0.1
"""Runs by which a batch size is measured, and undisturbed seconds after which there have been enough."""
_SHORTEST = 1e-6


@dataclass(frozen=True)
class BatchSizing:
    """Finds the batch sizes of one engine."""

    device: torch.device
    max_new_tokens: int
    starts_late: bool
    """Whether passes over prompts of edited models start from what is known."""
    same: Callable[[float], float]
    """Makes one rank's number that of all ranks that have to come to the same."""
    least: Callable[[int], int] | None = None
    """The least of all ranks' numbers, for ranks of which none can try again after memory ran out on it."""

    def find(self, phase: str, prompts: TokenRows, work: Callable[[TokenRows], Any], trials: int) -> int:
        """Rows per batch of a phase, of which ``work`` does a sample on some rows: of answers :data:`PROBE_TOKENS`.

        Batches may hold rows of so many ``trials``. Raises UserError where even one row does not fit.
        """
        on_cpu, longest = self.device.type == "cpu", sorted(prompts, key=len, reverse=True)
        if trials > 1 and not on_cpu:
            longest = [row for row in longest for _ in range(trials)]
        lend_spares()
        most = self._most_rows(phase, longest, work)
        if on_cpu:
            longest = self._as_computed(phase, longest)
        clock = time.process_time if on_cpu else time.perf_counter

        def tokens(count: int) -> float:  # rows that come later are shorter: their number is no measure of the work
            return sum(len(row) + (PROBE_TOKENS if phase == "generate" else 0) for row in longest[:count])

        return measure_batch_size(lambda count: work(longest[:count]), most, phase, self.same, clock, tokens)

    def _as_computed(self, phase: str, rows: TokenRows) -> list[Sequence[int]]:
        """Rows cut to as many tokens as let prompts and answers have the shares of the work that they will have."""
        share = _SHARE_COMPUTED if self.starts_late and phase != "capture" else 1.0
        if phase == "generate":
            share *= min(1.0, PROBE_TOKENS / self.max_new_tokens)
        return [row[-max(1, round(share * len(row))) :] for row in rows]

    def _most_rows(self, phase: str, longest: TokenRows, work: Callable[[TokenRows], Any]) -> int:
        """Rows of the largest batch that is tried; ``longest`` are the prompts, longest first.

        A CPU has to be asked how much memory it has: a process that takes more is ended, and cannot try again.
        """
        most = min(len(longest), MOST_ROWS)
        if self.device.type != "cpu" and self.least is None:
            return most
        rows, fitting = self._as_they_end(phase, longest[:most]), most
        try:
            fitting = rows_that_fit(lambda count: work(rows[:count]), most, self.device)
        except Exception as error:
            if self.least is not None or not is_out_of_memory(error):  # which measuring finds anew, and deals with
                raise
        return int(self.same(fitting)) if self.least is None else self.least(fitting)

    def _as_they_end(self, phase: str, rows: TokenRows) -> list[Sequence[int]]:
        """Rows as long as they will be when the last tokens of their answers are decoded."""
        added = max(0, self.max_new_tokens - PROBE_TOKENS) if phase == "generate" else 0
        return [[*row, *([row[-1]] * added)] for row in rows]


def measure_batch_size(
    run: Callable[[int], object],
    most: int,
    phase: str,
    same: Callable[[float], float] = lambda value: value,
    clock: Callable[[], float] = time.perf_counter,
    amount: Callable[[int], float] = float,
) -> int:
    """Rows per batch with the best measured throughput, up to ``most``.

    ``run(n)`` does a sample of the phase's work on n rows, which comes to ``amount(n)``. Sizes are doubled until two in
    a row bring no gain, for one measurement is easily off; then the size between the best and its successor is tried,
    so that it need not be a power of two. On a CPU ``clock`` is the processor's, since other programs' work should not
    count. ``same`` makes one rank's measurement that of all ranks, which have to run as often and come to one size.
    Raises :class:`UserError`, which names the ``phase``, where even one row does not fit.
    """
    if math.isinf(_seconds(run, 1, same, clock)):  # also: first calls pay for what is set up lazily
        raise too_large(phase)
    rates: dict[int, float] = {}

    def rate(size: int) -> float:
        if size not in rates:
            rates[size] = same(amount(size) / _fastest(run, size, same, clock))
        return rates[size]

    best, size, without_gain = 1, 1, 0
    while size < most and without_gain < 2:
        size = min(2 * size, most)
        if rate(size) == 0.0:
            break
        without_gain += 1
        if rate(size) > _GAIN * rate(best):
            best, without_gain = size, 0
    between = (best + min(2 * best, most)) // 2
    if best < between and rate(between) > _GAIN * rate(best):
        best = between
    return best


def _fastest(
    run: Callable[[int], object], size: int, same: Callable[[float], float], clock: Callable[[], float]
) -> float:
    """Seconds of the fastest of several runs, of which there are fewer the longer they take."""
    seconds: list[float] = []
    while len(seconds) < _MOST_RUNS and len(seconds) * min(seconds, default=0.0) < _LONG_ENOUGH:
        seconds.append(_seconds(run, size, same, clock))
    return min(seconds)


def _seconds(
    run: Callable[[int], object], size: int, same: Callable[[float], float], clock: Callable[[], float]
) -> float:
    """Seconds that a run takes; infinite where memory runs out."""
    started = clock()
    failed = False
    try:
        run(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if failed:
        release_memory()
    return same(math.inf if failed else max(clock() - started, _SHORTEST))
