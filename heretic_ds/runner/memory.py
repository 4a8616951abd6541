"""Batches that survive a lack of memory, and what memory was used."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar
from weakref import WeakSet

import torch

# `as` names are those that others still import from here.
from heretic_ds.device_memory import is_out_of_memory as is_out_of_memory
from heretic_ds.device_memory import note_failed_capture as note_failed_capture
from heretic_ds.device_memory import release_memory as release_memory
from heretic_ds.errors import UserError

log = logging.getLogger(__name__)
_highest = {"host": 0, "device": 0}  # the system's own peaks start anew where one piece of work is measured
Item = TypeVar("Item")
Result = TypeVar("Result")


class Spare(Protocol):
    """Somebody who holds memory that can be done without."""

    def give_back(self) -> bool:
        """Free it; whether there was any."""
        ...

    def lend(self) -> None:
        """Free it for the moment: it is taken again when it is needed."""
        ...


spares: WeakSet[Spare] = WeakSet()
"""Who is asked for memory where it runs out, before batches get smaller."""


def lend_spares() -> None:
    """Free what can be taken again: else a batch would be measured in what is left, and stay small when it is gone."""
    for spare in list(spares):
        spare.lend()


def in_batches(
    items: Sequence[Item],
    sizes: dict[str, int],
    phase: str,
    work: Callable[[Sequence[Item]], Result],
    cut: Callable[[Sequence[Item]], int] = len,
    retries: bool = True,
) -> Iterator[tuple[int, Result]]:
    """Run ``work`` over consecutive batches of ``sizes[phase]`` items, yielding (start, result).

    ``cut`` says how many of the first items that would make up a batch had better be one by themselves.
    A batch that runs out of memory is halved and tried again, and the smaller size is kept for the rest of the run;
    not so without ``retries``, for work that this rank cannot do again by itself.
    Raises :class:`UserError` where even one item does not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + sizes[phase]]
        batch = batch[: cut(batch)]
        failed = False
        try:
            result = work(batch)
        except Exception as error:
            if not (retries and is_out_of_memory(error)):
                raise
            failed = True
        if failed:  # outside the handler, where the traceback no longer holds the batch's tensors
            _halve(sizes, phase, len(batch))
            continue
        yield start, result
        start += len(batch)


def with_fewer_rows(
    work: Callable[[int], None], sizes: dict[str, int], phase: str, left: Callable[[], int] = lambda: sys.maxsize
) -> None:
    """Call ``work`` with ``sizes[phase]`` rows at a time, and with half as many whenever memory runs out.

    ``work`` goes on where the call before it was left; ``left`` says how many rows there still are at most.
    """
    while True:
        rows = min(sizes[phase], left())
        failed = False
        try:
            work(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        if not failed:
            return
        _halve(sizes, phase, min(rows, left()))


def _halve(sizes: dict[str, int], phase: str, rows: int) -> None:
    """Make batches half as large as one that ran out of memory, for the rest of the run, unless some can be had."""
    release_memory()
    if any([spare.give_back() for spare in list(spares)]):
        return
    if rows == 1:
        raise too_large(phase)
    sizes[phase] = rows // 2
    log.warning("out of memory with %d rows in a batch (%s); going on with %d", rows, phase, sizes[phase])


def too_large(phase: str) -> UserError:
    """What to say where memory does not hold a batch of one."""
    return UserError(
        f"a single prompt does not fit in memory while {phase} runs; use shorter prompts, a smaller "
        "generation.max_new_tokens, or a placement that spreads the model"
    )


def peak_memory() -> dict[str, int]:
    """Peak bytes used so far by this process on the host, and on its device (0 without one)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    _highest["host"], _highest["device"] = max(_highest["host"], host), max(_highest["device"], device)
    return dict(_highest)
