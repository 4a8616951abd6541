"""Steps of decoding, captured once as CUDA graphs and then replayed: one launch a step instead of some thousand.

A graph works on fixed memory with fixed shapes. Rows therefore lie in slots (:mod:`heretic_ds.runner.slots`), and
there is one graph for each of a few numbers of rows and columns, made when it is first needed. What differs between
steps (the tokens, their positions, whose trial a row belongs to, the edits of the trials themselves, edited weights) is
written into memory that the graphs read.

What makes graphs is a small function, so that everything but capturing and replaying runs on any device.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.runner.memory import is_out_of_memory, note_failed_capture
from heretic_ds.runner.slots import Slots

log = logging.getLogger(__name__)

_WARM_UPS = 2
"""Times that a step runs before it is captured: libraries take their working memory and choose their kernels then, and
the last time shows whether the host would wait."""
_FEWEST_ROWS = 8
_FEWEST_COLUMNS = 64


class CannotReplay(Exception):
    """Why steps cannot be replayed, in a few words."""


class NoRoom(CannotReplay):
    """Memory ran out: fewer rows may fit."""


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


class ReplayedSteps:
    """The steps of one model, over slots whose memory stays until :meth:`close`."""

    def __init__(self, model: PreTrainedModel, make_graph: Callable[[], MakeGraph]) -> None:
        """``make_graph`` gives a new maker, whose graphs share memory, each time that all earlier ones are dropped."""
        self._model, self._new_maker = model, make_graph
        self._make = make_graph()
        self._graphs: dict[tuple[int, int, int], Graph] = {}
        self._slots: Slots | None = None

    @property
    def slots(self) -> Slots:
        """The rows in flight. RuntimeError before :meth:`reserve`."""
        if self._slots is None:
            raise RuntimeError("rows were asked for before memory was reserved for them")
        return self._slots

    def reserve(self, rows: int, columns: int) -> None:
        """See to it that there is memory for as many rows of as many columns; rows in flight are forgotten."""
        have = self._slots
        if have is not None and have.rows >= rows and have.columns >= columns:
            return
        if have is not None:
            rows, columns = max(rows, have.rows), max(columns, have.columns)
        del have
        self.close()
        self._slots = Slots(self._model, rows, _rounded(columns, _FEWEST_COLUMNS))

    def rows_for(self, count: int) -> int:
        """The fewest rows, of the numbers that graphs are made for, which hold as many."""
        return next(size for size in reversed(row_buckets(self.slots.rows)) if size >= count)

    def columns_for(self, count: int) -> int:
        """The fewest columns, of the numbers that graphs are made for, which hold as many."""
        return next(size for size in column_buckets(self.slots.columns) if size >= count)

    def step(self, rows: int, columns: int, kind: int) -> Tensor:
        """The next token of the first rows, of sizes that graphs are made for, in memory that the next step writes to.

        ``kind`` tells apart steps that do different work: 0 without edits of their rows, else a number that grows when
        these get other memory.
        Raises :class:`CannotReplay` where the step cannot be captured, for whatever reason: steps that are not replayed
        tell the user of mistakes in the model's own code, if it has any. What was in flight is lost then.
        """
        slots, key = self.slots, (kind, rows, columns)
        if key not in self._graphs:
            self._graphs[key] = self._captured(rows, columns)
        self._graphs[key].replay()
        slots.advance(rows)
        return slots.next_R[:rows]

    def _captured(self, rows: int, columns: int) -> Graph:
        slots, failure = self.slots, None
        try:
            graph = self._make(lambda: slots.answer(rows, columns))
        except Exception as error:  # of CUDA, of a library on top of it, of the model's own code, or a lack of memory
            failure = _why(error)
        if failure is not None:  # outside the handler, where the traceback no longer holds tensors
            raise failure
        log.debug("captured a step of %d rows and %d columns", rows, columns)
        return graph

    def forget(self, below: int = sys.maxsize) -> None:
        """Drop the graphs of steps with edits of their rows: of the kinds below one, or of all."""
        self._keep(lambda kind: kind == 0 or kind >= below)

    def _keep(self, wanted: Callable[[int], bool]) -> None:
        kept = {key: graph for key, graph in self._graphs.items() if wanted(key[0])}
        if self._graphs and not kept:
            self._make = self._new_maker()  # the memory that graphs share goes with the last of them
        self._graphs = kept

    def close(self) -> None:
        """Drop all graphs and the memory of the slots."""
        self._keep(lambda kind: False)
        self._slots = None


def _why(error: BaseException) -> CannotReplay:
    """By the error that came first: ending a capture that has failed fails too, and says nothing of the cause."""
    while error.__context__ is not None:
        error = error.__context__
    if is_out_of_memory(error):
        return NoRoom("memory ran out while a step was captured")
    return CannotReplay(f"a step cannot be captured ({type(error).__name__}: {first_line(error)})")


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are made for, the largest first: ``most``, and about half as many each time."""
    sizes = [most]
    while sizes[-1] > _FEWEST_ROWS:
        sizes.append(_rounded((sizes[-1] + 1) // 2, _FEWEST_ROWS))
    return sizes


def column_buckets(most: int) -> list[int]:
    """Numbers of columns that graphs are made for, the smallest first: twice as many each time, up to ``most``."""
    sizes = [_FEWEST_COLUMNS]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], most]


def _rounded(number: int, unit: int) -> int:
    """The next multiple."""
    return -(-number // unit) * unit


def read_later(token_B: Tensor) -> Callable[[], list[int]]:
    """Start a copy of tokens to the host; what is returned waits for it, and for nothing that was started since."""
    if token_B.device.type != "cuda":
        return token_B.clone().tolist
    host_B = torch.empty(token_B.shape, dtype=token_B.dtype, pin_memory=True)
    host_B.copy_(token_B, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(token_B.device))  # where the copy is; another device may be current

    def tokens() -> list[int]:
        copied.synchronize()
        numbers: list[int] = host_B.tolist()
        return numbers

    return tokens
