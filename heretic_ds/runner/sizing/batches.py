"""Rows in batches: of the sizes that were measured to be best, or halved where memory runs out all the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from heretic_ds.errors import UserError
from heretic_ds.memory import release_memory
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.rows import Row
from heretic_ds.runner.sizing.sizes import Sizes, extent, too_large

log = logging.getLogger(__name__)
T = TypeVar("T")


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
        self._comm, self._name, self._retries = comm, name, retries
        self.evictable: list[Evictable] = []
        """Who is asked for memory where it runs out, before batches get smaller."""
        cautious = device.type == "cpu" or not retries
        self.measured = Sizes(comm, device, self._attempt, self._rest, max_new_tokens, cautious)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows per batch, as set, measured, or halved for want of memory."""
        return self.measured.rows

    @contextmanager
    def for_now(self, phase: str, rows: int) -> Iterator[None]:
        """While the context lasts, batches of a phase whose size is open have so many rows."""
        self.sizes[phase] = rows
        try:
            yield
        finally:
            del self.sizes[phase]

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
        Where the size is open it is measured by the first batches, which are small ones then: by all ranks, each of
        which has to have equally many rows. Raises :class:`UserError` where even one row does not fit.
        """
        start = 0
        if phase not in self.sizes:
            for batch, found in self.measured.measuring(rows, phase, work):
                yield batch, found
                start += len(batch)
        while start < len(rows):
            batch = rows[start : start + self.sizes[phase]]
            batch = batch[: cut([len(row.prompt) for row in batch])]  # answers may have begun before memory ran out
            size = (phase, kind, *extent(batch))
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
            size = (phase, most, *extent(left)[1:])
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

    def _rest(self) -> None:
        """Have memory given back, else a batch would be measured in what is left, and stay small when that is more."""
        for spare in self.evictable:
            spare.rest()

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
