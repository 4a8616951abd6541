"""Steps of decoding, captured once as CUDA graphs and then replayed: one launch a step instead of some thousand.

A graph works on fixed memory with fixed shapes: rows lie in slots (:mod:`heretic_ds.runner.slots`), and there is one
graph for each of a few numbers of rows and columns, made when it is first needed. What differs between steps (tokens,
positions, whose trial a row belongs to, the trials' edits, edited weights) is written into memory that graphs read.

What makes graphs is a small function, so that everything but capturing and replaying runs on any device.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from heretic_ds.anatomy import Anatomy, has_expert_dispatch
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.edits.experts import base_implementation
from heretic_ds.memory import is_out_of_memory, note_failed_capture
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.slots import Slots

log = logging.getLogger(__name__)

_WARM_UPS = 2
"""Times that a step runs before it is captured: libraries take their working memory and choose their kernels then, and
the last time shows whether the host would wait."""
_FEWEST_ROWS, _FEWEST_COLUMNS = 8, 64
_STATIC_EXPERTS = frozenset({"batched_mm", "grouped_mm"})
"""Implementations of experts that do the same work whatever the tokens are."""
_GROUPED_PRODUCTS = (torch.bfloat16, (9, 0))
"""The dtype, and the least compute capability, of grouped products that PyTorch computes in one kernel. Others are
loops over the groups, whose sizes the host has to know."""


class CannotCapture(Exception):
    """Why steps cannot be captured, in a few words."""


class Graph(Protocol):
    """Work on fixed memory."""

    def replay(self) -> None:
        """Do it again, with what the memory holds now."""
        ...


MakeGraph = Callable[[Callable[[], None]], Graph]
"""Makes a graph of what a function does; calling the function several times has to be the same as calling it once."""


class CudaGraphs:
    """Captures functions on one device, into graphs that share their working memory: they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._aside = torch.cuda.Stream(device)  # libraries keep working memory for every stream that they have seen
        self._pool: Any = None

    def __call__(self, step: Callable[[], None]) -> Graph:
        with torch.cuda.device(self._device):
            self._warm_up(step)
            graph = torch.cuda.CUDAGraph()
            try:
                # The outer context because PyTorch's own does not go back to the stream before where ending a capture
                # fails. Of this thread alone: what other libraries' threads ask of the device is not the graph's.
                with (
                    torch.cuda.stream(self._aside),
                    torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"),
                ):
                    step()
            except BaseException:
                note_failed_capture()
                raise
            self._pool = self._pool or graph.pool()
        captured: Graph = graph
        return captured

    def _warm_up(self, step: Callable[[], None]) -> None:
        current = torch.cuda.current_stream()
        self._aside.wait_stream(current)
        try:
            with torch.cuda.stream(self._aside):
                for _ in range(_WARM_UPS - 1):
                    step()
                with _waiting_refused():
                    step()
        finally:  # whoever goes on after a failure must not be given memory that is still being written to
            current.wait_stream(self._aside)


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Whatever makes the host wait for the device raises RuntimeError, as in a capture, but breaks nothing: a capture
    that fails may leave PyTorch's allocator and random generators believing that it goes on."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says, once, that not everything is noticed
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Graphs:
    """The captured steps over one set of slots, whose memory stays."""

    def __init__(self, slots: Slots, new_maker: Callable[[], MakeGraph]) -> None:
        """``new_maker`` gives a maker, whose graphs share memory, each time that all earlier ones are dropped."""
        self.slots, self._new_maker = slots, new_maker
        self._make = new_maker()
        self._graphs: dict[tuple[int, int, int], Graph] = {}

    def pad(self, rows: int, columns: int) -> tuple[int, int]:
        """The fewest rows and columns, of the numbers that graphs are made for, which hold as many."""
        return (
            next(size for size in reversed(row_buckets(self.slots.rows)) if size >= rows),
            next(size for size in column_buckets(self.slots.columns) if size >= columns),
        )

    def replay(self, rows: int, columns: int, edits: int) -> None:
        """:meth:`Slots.answer` for sizes that :meth:`pad` gave.

        ``edits`` tells apart steps that do different work: 0 without edits of their rows, else a number that grows when
        these get other memory. Raises :class:`CannotCapture` where the step cannot be captured, for whatever reason:
        steps that are not captured tell the user of mistakes in the model's own code, if it has any.
        """
        key = (edits, rows, columns)
        if key not in self._graphs:
            self._graphs[key] = self._captured(rows, columns)
            log.debug("captured a step of %d rows and %d columns", rows, columns)
        self._graphs[key].replay()

    def _captured(self, rows: int, columns: int) -> Graph:
        failure: Exception
        try:
            return self._make(lambda: self.slots.answer(rows, columns))
        except Exception as error:  # of CUDA, of a library on top of it, of the model's own code, or a lack of memory
            first = _first(error)
            failure = CannotCapture(f"a step cannot be captured ({type(first).__name__}: {first_line(first)})")
            if is_out_of_memory(first):
                failure = torch.OutOfMemoryError("memory ran out while a step was captured")
        raise failure  # outside the handler, where the traceback no longer holds tensors

    def forget(self, below: int = sys.maxsize) -> None:
        """Drop the graphs of steps with edits of their rows: of the numbers below one, or of all."""
        kept = {key: graph for key, graph in self._graphs.items() if key[0] == 0 or key[0] >= below}
        if self._graphs and not kept:
            self._make = self._new_maker()  # the memory that graphs share goes with the last of them
        self._graphs = kept


def _first(error: BaseException) -> BaseException:
    """The error that came first: ending a capture that has failed fails too, and says nothing of the cause."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are made for, the largest first: ``most``, and about half as many each time."""
    sizes = [most]
    while sizes[-1] > _FEWEST_ROWS:
        sizes.append(rounded((sizes[-1] + 1) // 2, _FEWEST_ROWS))
    return sizes


def column_buckets(most: int) -> list[int]:
    """Numbers of columns that graphs are made for, the smallest first: twice as many each time, up to ``most``."""
    sizes = [_FEWEST_COLUMNS]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], most]


def rounded(number: int, unit: int = _FEWEST_COLUMNS) -> int:
    """The next multiple."""
    return -(-number // unit) * unit


def makers_for(device: torch.device) -> Callable[[], MakeGraph] | None:
    """What gives makers of graphs on a device; None where there are no graphs."""
    return partial(CudaGraphs, device) if device.type == "cuda" else None


def obstacle(forward: Forward, anatomy: Anatomy) -> str | None:
    """Why steps over slots cannot be captured; None where nothing is known against it."""
    for writer in anatomy.writers:
        if writer.experts is not None or "*" in writer.path.split("."):
            experts = forward.model.get_submodule(writer.module)
            chosen = base_implementation(experts) if has_expert_dispatch(experts) else "eager"
            if chosen not in _STATIC_EXPERTS:
                return f"which experts run depends on the tokens (experts implementation {chosen})"
            weight = next(experts.parameters())
            if chosen == "grouped_mm" and waits_for_groups(weight.device, weight.dtype):
                return f"the host waits for the sizes of grouped products of {weight.dtype} on this device"
    return None


def waits_for_groups(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped products are known to make the host wait for a device; a warm-up finds out about the others."""
    one_kernel, capability = _GROUPED_PRODUCTS
    return device.type == "cuda" and (dtype != one_kernel or torch.cuda.get_device_capability(device) < capability)
