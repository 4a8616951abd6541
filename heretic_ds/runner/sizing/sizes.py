"""The rows per batch of each phase of an engine: as they are set, or measured here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from heretic_ds import progress
from heretic_ds.errors import UserError
from heretic_ds.memory import free_bytes, peak_of, release_memory, wait_for
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.rows import Row
from heretic_ds.runner.sizing.ladder import Ladder
from heretic_ds.runner.sizing.measure import SHORTEST, WorkingMemory, measure_batch_size, working_memory

log = logging.getLogger(__name__)
T = TypeVar("T")

PHASES = {"capture": "residuals", "kl": "distributions", "generate": "answers"}
"""What passes of a phase are made for."""
MOST_ROWS = 512
"""Largest batch that is tried."""
PROBE_TOKENS = 8
"""Answer tokens per row while the batch size for generation is measured."""
FITTING_TOKENS = 2
"""The same while the memory that rows take is measured: one more than a pass over the prompts gives."""
Work = Callable[[Sequence[Row]], Any]
"""What is done with the rows of a batch."""
_SHARE_COMPUTED = 0.5
"""About how much of a pass over prompts is left where it starts from what is known."""


class Attempt(Protocol):
    """Runs work on so many rows of a phase."""

    def __call__(self, phase: str, rows: int, work: Callable[[], T], size: Hashable) -> tuple[bool, T | None]:
        """Whether memory held it on every partner, and what it gave; work of a ``size`` has been done before or not."""
        ...


@dataclass
class _Timed(Generic[T]):
    """One pass by which a batch size is measured."""

    results: list[T] = field(default_factory=list)
    """What it gave; empty where memory did not hold it."""
    seconds: float = math.inf
    """Of the slowest rank; infinitely many where memory did not hold it on some rank."""
    wall: float = math.inf
    peak: int | None = None
    """Bytes, where they were asked for and can be told."""


class Sizes:
    """Rows per batch, by phase; all ranks of an engine come to the same."""

    def __init__(
        self,
        comm: Comm,
        device: torch.device,
        attempt: Attempt,
        rest: Callable[[], object],
        max_new_tokens: int,
        cautious: bool,
    ) -> None:
        """``rest`` has memory given back that can be taken again; ``cautious``: memory has to be known before it is
        taken, for whoever takes more than there is cannot try again."""
        self._comm, self._device, self._attempt, self._rest = comm, device, attempt, rest
        self._max_new_tokens, self._cautious = max_new_tokens, cautious
        self.rows: dict[str, int] = {}
        """As set, measured, or halved for want of memory."""
        self.bytes: dict[str, int] = {}
        """Of batches of the sizes that were measured here: what they take beside the weights, 0 where nobody asked."""
        self.starts_late = False
        """Whether passes over prompts of edited models start from what is known."""
        self._tokens: dict[str, float] = {}
        """In the batches that were measured on passes of prompts."""

    def find(
        self,
        rows: Sequence[Row],
        phase: str,
        work: Work,
        trials: int = 1,
        like: str = "",
        fitting: Work | None = None,
    ) -> None:
        """Settle the rows per batch of a phase where that is open; ``work`` does a sample of it on some rows.

        A sample of answers has :data:`PROBE_TOKENS` tokens; ``fitting`` does one of :data:`FITTING_TOKENS`, from which
        memory is told. Batches may hold rows of so many ``trials``. Where passes of the phase are ``like`` those of one
        that was measured on them, batches get as many tokens. For answers on a CPU that means all rows at once, if
        these are no more: a step has a token of each. Else they are measured, since steps have their own costs.
        Raises UserError where even one row does not fit.
        """
        if phase in self.rows:
            return
        on_cpu, prompts = self._device.type == "cpu", sorted((row.prompt for row in rows), key=len, reverse=True)
        if trials > 1 and not on_cpu:
            prompts = [prompt for prompt in prompts for _ in range(trials)]
        self._rest()
        with progress.work("batch size"):
            most, memory = self._most_rows(phase, prompts, fitting or work)
            computed = self._as_computed(phase, prompts) if on_cpu else prompts
            known = self._tokens.get(like)
            if known is None or (phase == "generate" and not (on_cpu and most <= known)):
                self._measure(computed, most, phase, work, memory)
            elif phase == "generate":
                self._settle(phase, most, memory)
            else:
                alike = round(known * len(computed) / sum(map(len, computed)))
                self._settle(phase, max(1, min(int(self._comm.least(alike)), most)), memory)

    def _settle(self, phase: str, rows: int, memory: WorkingMemory | None, rate: float | None = None) -> None:
        """Take a batch size, and say what it came to."""
        self.rows[phase], self.bytes[phase] = rows, 0 if memory is None else memory.of(rows)
        alike = "no more tokens a step than" if phase == "generate" else "as many tokens as"
        told = f"{alike} for residuals" if rate is None else f"{rate:,.0f} tokens/s"
        log.info("batch size for %s: %d rows (%s)", PHASES[phase], rows, told)

    def _measure(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        phase: str,
        work: Work,
        memory: WorkingMemory | None,
    ) -> None:
        """Settle the rows per batch of a phase by measuring on samples."""
        fastest: dict[int, float] = {}

        def run(count: int) -> bool:
            sample, started = [Row(prompt) for prompt in prompts[:count]], time.perf_counter()
            ok = self._attempt(phase, count, lambda: work(sample), ("measured", phase, count))[0]
            wait_for(self._device)
            fastest[count] = min(time.perf_counter() - started, fastest.get(count, math.inf))
            return ok

        def tokens(count: int) -> float:  # rows that come later are shorter: their number is no measure of the work
            return sum(len(row) + (PROBE_TOKENS if phase == "generate" else 0) for row in prompts[:count])

        size = measure_batch_size(run, most, self._comm, self._clock, tokens, self._cautious)
        if not size:
            raise too_large(phase)
        self._settle(phase, size, memory, tokens(size) / max(fastest[size], SHORTEST))

    @property
    def _clock(self) -> Callable[[], float]:
        """Seconds by which sizes are compared: on a CPU the processor's, for other programs' work should not count."""
        return time.process_time if self._device.type == "cpu" else time.perf_counter

    def measuring(
        self, rows: Sequence[Row], phase: str, work: Callable[[Sequence[Row]], T]
    ) -> Iterator[tuple[Sequence[Row], T]]:
        """Run ``work`` over the first rows in batches of more and more of them, until it is clear how many are best.

        The first pass, of one row, pays for what is set up lazily, and tells nothing.
        """
        ladder, first, start = Ladder(min(len(rows), MOST_ROWS)), True, 0
        peaks, found = dict[int, int | None](), dict[int, tuple[float, float]]()
        memory: WorkingMemory | None = None
        self._rest()
        while True:
            left = int(self._comm.least(len(rows) - start))  # fewer where another rank's batch did not fit
            size = min(1 if first else ladder.next or 0, left)
            if size <= ladder.best:
                break
            batch, probing = rows[start : start + size], self._cautious and not first and len(peaks) < 2
            timed = self._timed(batch, phase, work, probing)
            if first and math.isinf(timed.seconds):
                raise too_large(phase)
            if not first:
                tokens = self._comm.least(sum(len(row.prompt) for row in batch))
                ladder.note(size, tokens, timed.seconds)
                found[size] = tokens, tokens / timed.wall
            if probing:
                peaks[size] = timed.peak
                memory = WorkingMemory.of_peaks(peaks) if len(peaks) == 2 else None
                within = ladder.most if memory is None else memory.rows_within(free_bytes(self._device))
                ladder.most = min(ladder.most, int(self._comm.least(within)))
            first = False
            for result in timed.results:
                start += size
                yield batch, result
        best = max(1, ladder.best)
        if found:
            self._tokens[phase] = found[best][0]
        self._settle(phase, min(best, ladder.most), memory, found[best][1] if found else None)

    def _timed(self, batch: Sequence[Row], phase: str, work: Callable[[Sequence[Row]], T], probing: bool) -> _Timed[T]:
        """Run ``work`` on a batch once, and see how long the slowest rank takes, and what memory this one does."""
        found = _Timed[T]()

        def run() -> None:
            began, started = self._clock(), time.perf_counter()
            ok, result = self._attempt(phase, len(batch), lambda: work(batch), (phase, "", *extent(batch)))
            wait_for(self._device)
            if ok:
                found.seconds, found.wall = self._clock() - began, time.perf_counter() - started
                found.results.append(result)  # type: ignore[arg-type]  # a result is there where memory held it

        if probing:
            found.peak = peak_of(run, self._device)
        else:
            run()
        if not found.results:
            release_memory()
        found.seconds = self._comm.most(max(found.seconds, SHORTEST))
        return found

    def _as_computed(self, phase: str, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Rows cut to as many tokens as let prompts and answers have the shares of the work that they will have."""
        share = _SHARE_COMPUTED if self.starts_late and phase != "capture" else 1.0
        if phase == "generate":
            share *= min(1.0, PROBE_TOKENS / self._max_new_tokens)
        return [row[-max(1, round(share * len(row))) :] for row in prompts]

    def _most_rows(self, phase: str, prompts: Sequence[Sequence[int]], work: Work) -> tuple[int, WorkingMemory | None]:
        """Rows of the largest batch that is tried, and what batches take; ``prompts`` are the longest first."""
        most, memory = min(len(prompts), MOST_ROWS), None
        if not self._cautious:
            return most, None
        # As long as they will be when the last tokens of their answers are decoded.
        added = max(0, self._max_new_tokens - FITTING_TOKENS) if phase == "generate" else 0
        rows = [Row([*prompt, *([prompt[-1]] * added)]) for prompt in prompts[:most]]

        def run(count: int) -> None:
            for row in rows[:count]:
                row.begin()
            if not self._attempt(phase, count, lambda: work(rows[:count]), ("fitting", phase, count))[0]:
                raise torch.OutOfMemoryError

        try:
            memory = working_memory(run, most, self._device)
            fitting = most if memory is None else min(most, memory.rows_within(free_bytes(self._device)))
        except torch.OutOfMemoryError:
            release_memory()
            fitting = 1 if self._comm.partners is not None else most  # alone, measuring finds it anew
        return int(self._comm.least(fitting)), memory


def extent(rows: Sequence[Row]) -> tuple[int, int, int]:
    """What the memory of a pass depends on: how many rows, the longest prompt, of how many trials."""
    return len(rows), max(len(row.prompt) for row in rows), 1 + max(row.trial for row in rows)


def too_large(phase: str) -> UserError:
    """What to say where memory does not hold a batch of one."""
    return UserError(
        f"a single prompt does not fit in memory while {phase} runs; use shorter prompts, a smaller "
        "generation.max_new_tokens, or a placement that spreads the model"
    )
