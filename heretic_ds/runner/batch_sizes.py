"""How many rows a batch has: as many as memory holds and the best throughput asks for, both found by measuring.

And what happens where memory runs out all the same.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

from heretic_ds import progress
from heretic_ds.errors import UserError
from heretic_ds.memory import free_bytes, peak_of, release_memory
from heretic_ds.runner.comm import ALONE, Comm
from heretic_ds.runner.rows import Row

log = logging.getLogger(__name__)
T = TypeVar("T")

PHASES = {"capture": "residuals", "kl": "distributions", "generate": "answers"}
"""What passes of a phase are made for."""
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
_SAFE_SHARE = 0.5
"""Part of the free memory that a batch may fill: other ranks, and other programs, take from the same."""


class Evictable(Protocol):
    """Somebody who holds memory that can be done without."""

    def evict(self) -> bool:
        """Free it for good; whether there was any."""
        ...

    def rest(self) -> None:
        """Free it for the moment: it is taken again when it is needed."""
        ...


class Batches:
    """Rows of one engine in batches, by phase (``capture``, ``kl``, ``generate``)."""

    def __init__(self, comm: Comm, device: torch.device, name: str, max_new_tokens: int, retries: bool = True) -> None:
        """``name`` is the placement's; without ``retries`` it is lost once memory has run out in a pass."""
        self._comm, self._device, self._name, self._max_new_tokens = comm, device, name, max_new_tokens
        self._retries = retries
        self.sizes: dict[str, int] = {}
        """Rows per batch, as set, measured, or halved for want of memory."""
        self.evictable: list[Evictable] = []
        """Who is asked for memory where it runs out, before batches get smaller."""
        self.starts_late = False
        """Whether passes over prompts of edited models start from what is known."""

    def over(
        self,
        rows: Sequence[Row],
        phase: str,
        work: Callable[[Sequence[Row]], T],
        cut: Callable[[list[int]], int] = len,
        kind: str = "",
    ) -> Iterator[tuple[Sequence[Row], T]]:
        """Run ``work`` over consecutive batches of rows, the longest first, yielding (batch, result).

        ``cut`` says, by their lengths, how many of the first rows that would make up a batch had better be one by
        themselves; ``kind`` tells apart work of one phase that takes other memory. A batch that runs out of memory on
        any partner is halved on all of them and tried again, and the smaller size is kept for the rest of the run.
        Raises :class:`UserError` where even one row does not fit.
        """
        start = 0
        while start < len(rows):
            batch = rows[start : start + self.sizes[phase]]
            batch = batch[: cut([len(row.prompt) for row in batch])]  # answers may have begun before memory ran out
            size = (phase, kind, *_extent(batch))
            ok, result = self._attempt(phase, len(batch), lambda: work(batch), size)  # noqa: B023 - called at once
            if not ok:
                self._shrink(phase, len(batch))
                continue
            yield batch, result  # type: ignore[misc]  # a result is there where memory held it
            start += len(batch)

    def finish(self, rows: Sequence[Row], phase: str, work: Callable[[int], None]) -> None:
        """Call ``work`` with as many rows at a time as the phase has, and with half as many whenever memory runs out.

        ``work`` goes on with those of the rows that are not done. With partners all rows that it was given begin anew:
        one may have come a token further than another, on which memory ran out, and they have to go on alike.
        """
        while left := [row for row in rows if not row.done]:
            most = min(self.sizes[phase], len(left))
            size = (phase, most, *_extent(left)[1:])
            ok, _ = self._attempt(phase, most, lambda: work(most), size)  # noqa: B023 - called at once
            for row in left if not ok and self._comm.partners is not None else ():
                row.begin()
            if not ok and (unfinished := sum(not row.done for row in left)):
                self._shrink(phase, min(most, unfinished))

    def make_ready(self, work: Callable[[], object], undo: Callable[[], object], trials: int) -> None:
        """Do what a pass of several trials needs before: where memory runs out, in place of what can be done without.

        Where that happens on one partner, others may have come further, or to the end: all of them ``undo`` what they
        did. Raises :class:`UserError` where there is nothing to be done without.
        """
        while not self._comm.attempt(work)[0]:
            undo()
            release_memory()
            if not self._retries or not self._evicted():
                raise UserError(
                    f"memory ran out while edits of {trials} trials were made ready for one pass; "
                    f"set search.trials_per_pass below {trials}"
                )

    def _evicted(self) -> bool:
        """Free what can be done without; whether there was any."""
        return any([spare.evict() for spare in self.evictable])

    def _attempt(self, phase: str, rows: int, work: Callable[[], T], size: Any) -> tuple[bool, T | None]:
        """Whether memory held the work on so many rows, and what it gave. Raises UserError where it cannot go on."""
        try:
            ok, value = self._comm.attempt(work, size)
        except MemoryError as error:
            raise self._lost(phase, rows) from error
        if not (ok or self._retries):
            raise self._lost(phase, rows)
        return ok, value

    def _shrink(self, phase: str, rows: int) -> None:
        """Make batches half as large as one that ran out of memory, for the rest of the run, unless some can be had."""
        release_memory()
        if self._evicted():
            return
        if rows <= 1:
            raise too_large(phase)
        self.sizes[phase] = rows // 2
        log.warning("out of memory with %d rows in a batch (%s); going on with %d", rows, phase, self.sizes[phase])

    def _lost(self, phase: str, rows: int) -> UserError:
        if rows <= 1:
            return too_large(phase)
        return UserError(
            f"memory ran out with {rows} rows in a batch ({phase}), from which {self._name} cannot recover; "
            f"set generation.batch_size below {rows}"
        )

    def find(self, rows: Sequence[Row], phase: str, work: Callable[[Sequence[Row]], Any], trials: int = 1) -> None:
        """Settle the rows per batch of a phase where that is open; ``work`` does a sample of it on some rows.

        A sample of answers has :data:`PROBE_TOKENS` tokens. Batches may hold rows of so many ``trials``. Raises
        UserError where even one row does not fit.
        """
        if phase in self.sizes:
            return
        on_cpu, prompts = self._device.type == "cpu", sorted((row.prompt for row in rows), key=len, reverse=True)
        if trials > 1 and not on_cpu:
            prompts = [prompt for prompt in prompts for _ in range(trials)]
        for spare in self.evictable:  # else a batch would be measured in what is left, and stay small when it is gone
            spare.rest()
        with progress.work("batch size"):
            most = self._most_rows(phase, prompts, work)
            self._measure(self._as_computed(phase, prompts) if on_cpu else prompts, most, phase, work)

    def _measure(
        self, prompts: Sequence[Sequence[int]], most: int, phase: str, work: Callable[[Sequence[Row]], Any]
    ) -> None:
        """Settle the rows per batch of a phase by measuring, and say what it came to."""
        fastest: dict[int, float] = {}

        def run(count: int) -> bool:
            sample, started = [Row(prompt) for prompt in prompts[:count]], time.perf_counter()
            ok = self._attempt(phase, count, lambda: work(sample), ("measured", phase, count))[0]
            fastest[count] = min(time.perf_counter() - started, fastest.get(count, math.inf))
            return ok

        def tokens(count: int) -> float:  # rows that come later are shorter: their number is no measure of the work
            return sum(len(row) + (PROBE_TOKENS if phase == "generate" else 0) for row in prompts[:count])

        clock = time.process_time if self._device.type == "cpu" else time.perf_counter
        self.sizes[phase] = size = measure_batch_size(run, most, phase, self._comm, clock, tokens)
        rate = tokens(size) / max(fastest.get(size, math.inf), _SHORTEST)
        log.info("batch size for %s: %d rows (%s tokens/s)", PHASES[phase], size, f"{rate:,.0f}")

    def _as_computed(self, phase: str, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Rows cut to as many tokens as let prompts and answers have the shares of the work that they will have."""
        share = _SHARE_COMPUTED if self.starts_late and phase != "capture" else 1.0
        if phase == "generate":
            share *= min(1.0, PROBE_TOKENS / self._max_new_tokens)
        return [row[-max(1, round(share * len(row))) :] for row in prompts]

    def _most_rows(self, phase: str, prompts: Sequence[Sequence[int]], work: Callable[[Sequence[Row]], Any]) -> int:
        """Rows of the largest batch that is tried; ``prompts`` are the longest first.

        A CPU has to be asked how much memory it has: a process that takes more is ended, and cannot try again.
        """
        most = min(len(prompts), MOST_ROWS)
        if self._device.type != "cpu" and self._retries:
            return most
        # As long as they will be when the last tokens of their answers are decoded.
        added = max(0, self._max_new_tokens - PROBE_TOKENS) if phase == "generate" else 0
        rows = [Row([*prompt, *([prompt[-1]] * added)]) for prompt in prompts[:most]]

        def run(count: int) -> None:
            for row in rows[:count]:
                row.begin()
            if not self._attempt(phase, count, lambda: work(rows[:count]), ("fitting", phase, count))[0]:
                raise torch.OutOfMemoryError

        try:
            fitting = rows_that_fit(run, most, self._device)
        except torch.OutOfMemoryError:
            release_memory()
            fitting = 1 if self._comm.partners is not None else most  # alone, measuring finds it anew
        return int(self._comm.least(fitting))


def _extent(rows: Sequence[Row]) -> tuple[int, int, int]:
    """What the memory of a pass depends on: how many rows, the longest prompt, of how many trials."""
    return len(rows), max(len(row.prompt) for row in rows), 1 + max(row.trial for row in rows)


def rows_that_fit(run: Callable[[int], object], most: int, device: torch.device) -> int:
    """Rows, at most ``most``, whose working memory fits, by the peaks of two small batches.

    ``run(n)`` does a sample of the work on n rows. Without a way to measure memory, ``most``.
    """
    few, more = 1, min(4, most)
    run(few)  # the first call allocates what all later ones share
    if more == few:
        return most
    low, high = peak_of(lambda: run(few), device), peak_of(lambda: run(more), device)
    if low is None or high is None or high <= low:
        return most
    row = (high - low) / (more - few)
    return max(1, min(most, int(few + (_SAFE_SHARE * free_bytes(device) - low) / row)))


def measure_batch_size(
    run: Callable[[int], bool],
    most: int,
    phase: str,
    comm: Comm = ALONE,
    clock: Callable[[], float] = time.perf_counter,
    amount: Callable[[int], float] = float,
) -> int:
    """Rows per batch with the best measured throughput, up to ``most``.

    ``run(n)`` does a sample of the phase's work on n rows, which comes to ``amount(n)``, and says whether memory held
    it. Sizes are doubled until two in a row bring no gain, for one measurement is easily off; then the size between the
    best and its successor is tried, so that it need not be a power of two. On a CPU ``clock`` is the processor's, since
    other programs' work should not count. All ranks come to one size: that of the slowest, which memory held on each.
    Raises :class:`UserError`, which names the ``phase``, where even one row does not fit.
    """

    def seconds(size: int) -> float:
        started = clock()
        if not run(size):
            release_memory()
            return comm.most(math.inf)
        return comm.most(max(clock() - started, _SHORTEST))

    @cache
    def rate(size: int) -> float:
        """The best of several runs, of which there are fewer the longer they take."""
        found: list[float] = []
        while len(found) < _MOST_RUNS and len(found) * min(found, default=0.0) < _LONG_ENOUGH:
            found.append(seconds(size))
        return comm.least(amount(size) / min(found))

    if math.isinf(seconds(1)):  # also: first calls pay for what is set up lazily
        raise too_large(phase)

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


def too_large(phase: str) -> UserError:
    """What to say where memory does not hold a batch of one."""
    return UserError(
        f"a single prompt does not fit in memory while {phase} runs; use shorter prompts, a smaller "
        "generation.max_new_tokens, or a placement that spreads the model"
    )
