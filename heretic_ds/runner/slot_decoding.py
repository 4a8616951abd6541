"""Greedy decoding over slots: the same answers as :mod:`heretic_ds.runner.decode`, by steps that are replayed.

The host is always one step behind: while the device computes a step, the tokens of the step before it are read, and
scorers asked. A row that has ended is noticed one step late, and what it answers in that step is discarded.

Shapes: B rows, S positions, N rows that join.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heretic_ds.prompts import TokenRows
from heretic_ds.runner.decode import COMPACT_BELOW, Answers, places
from heretic_ds.runner.forward import Prefill
from heretic_ds.runner.graphs import NoRoom, ReplayedSteps, read_later
from heretic_ds.runner.memory import is_out_of_memory
from heretic_ds.runner.padding import batches_of
from heretic_ds.scoring.base import Decided

_AHEAD = 1
"""Steps that the device may have been given beyond those whose tokens have been read."""


class Assign(Protocol):
    """Told before a forward pass, whenever rows have changed, which prompt each of them answers."""

    def __call__(self, rows: Sequence[int], /, into: Tensor | None = None) -> None:
        """``into`` [B] is where steps that are replayed will look for what depends on it."""
        ...


class _SlotDecoder:
    """One run over a list of prompts."""

    def __init__(
        self,
        prefill: Prefill,
        steps: ReplayedSteps,
        kind: int,
        prompts: TokenRows,
        answers: Answers,
        most: int,
        on_rows: Assign | None,
    ) -> None:
        self._prefill, self._steps, self._kind = prefill, steps, kind
        self._prompts, self._answers, self._on_rows = prompts, answers, on_rows
        self._most, self._waiting = most, list(range(len(prompts)))
        steps.reserve(most, max(map(len, prompts)) + answers.limit)
        self._rows = [0] * steps.slots.rows
        """The prompt that each slot's row answers, or answered last."""
        self._live = [False] * steps.slots.rows
        self._announced: list[int] = []
        self._unread: deque[Callable[[], list[int]]] = deque()
        self._ended: list[int] = []

    def run(self) -> Iterator[int]:
        """Prompts as their answers end."""
        while True:
            ended, self._ended = self._ended, []
            yield from ended
            going, columns = places(self._live), self._columns()
            if self._waiting and len(going) <= COMPACT_BELOW * self._most:
                self._settled(self._fill)
            elif not going:
                return
            elif self._steps.rows_for(len(going)) < self._steps.rows_for(going[-1] + 1):
                self._settled(self._move_together)
            elif all(len(self._answers.of[self._rows[p]]) + len(self._unread) >= self._answers.limit for p in going):
                self._read()  # no row needs another step
            else:
                self._step(self._steps.rows_for(going[-1] + 1), self._steps.columns_for(columns))

    def _settled(self, change: Callable[[], None]) -> None:
        """Change the rows, or first read what they have answered: by that, other rows may have to change."""
        if self._unread:
            self._read()
        else:
            change()

    def _columns(self) -> int:
        """Columns that live rows use once they have taken the next step."""
        lengths = [
            len(self._prompts[row]) + len(self._answers.of[row])
            for row, live in zip(self._rows, self._live, strict=True)
            if live
        ]
        return max(lengths, default=0) + len(self._unread)

    def _step(self, rows: int, columns: int) -> None:
        if self._rows[:rows] != self._announced:
            self._announced = self._rows[:rows]
            if self._on_rows is not None:
                self._on_rows(self._announced, self._steps.slots.trial_R[:rows])
        token_B = self._steps.step(rows, columns, self._kind)
        self._unread.append(read_later(token_B))
        if len(self._unread) > _AHEAD:
            self._read()

    def _read(self) -> None:
        """Note the tokens of the oldest step that has not been read."""
        tokens = self._unread.popleft()()
        # Rows lie where they lay when the step was taken: they change when everything has been read.
        live = self._live[: len(tokens)]
        self._ended += self._answers.note(self._rows, live, tokens)
        self._live[: len(tokens)] = live

    def _fill(self) -> None:
        """Give free slots to the next prompts, with the first token of each answer."""
        free = [slot for slot, live in enumerate(self._live[: self._most]) if not live]
        rows, self._waiting = self._waiting[: len(free)], self._waiting[len(free) :]
        rows = sorted(rows, key=lambda row: -len(self._prompts[row]))
        for part in batches_of([len(self._prompts[row]) for row in rows]):
            self._begin(rows[part.start : part.stop], free[part.start : part.stop])

    def _begin(self, rows: list[int], slots: list[int]) -> None:
        self._announced = []  # those of the next step have to be told again after these
        if self._on_rows is not None:
            self._on_rows(rows)
        memory, prompts = self._steps.slots, [self._prompts[row] for row in rows]
        cache = memory.prompt_cache()
        token_N = self._prefill(prompts, cache).logits_BV.argmax(dim=-1)
        memory.join(cache, [len(row) for row in prompts], token_N, slots)
        live = [True] * len(rows)
        self._ended += self._answers.note(rows, live, token_N.tolist())
        for row, slot, goes_on in zip(rows, slots, live, strict=True):
            self._rows[slot], self._live[slot] = row, goes_on

    def _move_together(self) -> None:
        """Move rows from the last slots into free ones among the first, so that a smaller step holds them all."""
        count = sum(self._live)
        origins = [slot for slot in places(self._live) if slot >= count]
        targets = [slot for slot in range(count) if not self._live[slot]]
        self._steps.slots.move(origins, targets, self._columns())
        for origin, target in zip(origins, targets, strict=True):
            self._rows[target], self._live[target], self._live[origin] = self._rows[origin], True, False


@torch.inference_mode()
def replayed_answers(
    model: PreTrainedModel,
    steps: ReplayedSteps,
    prompts: TokenRows,
    pad_id: int,
    ends: Collection[int],
    max_new_tokens: int,
    decided: Decided | None = None,
    rows_at_once: int | None = None,
    on_rows: Assign | None = None,
    kind: int = 0,
    prefill: Prefill | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers (index of the prompt, tokens without the end token) in the order in which they end.

    What :func:`heretic_ds.runner.decode.finished_answers` gives, with its arguments; ``kind`` is that of
    :meth:`ReplayedSteps.step`. Raises :class:`CannotReplay` where a step cannot be captured, and of that
    :class:`NoRoom` where memory runs out.
    """
    answers = Answers(len(prompts), ends, max_new_tokens, decided)
    failed = False
    try:
        most = min(rows_at_once or len(prompts), len(prompts))
        decoder = _SlotDecoder(prefill or Prefill(model, pad_id), steps, kind, prompts, answers, most, on_rows)
        for row in decoder.run():
            yield row, answers.of[row]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if failed:  # outside the handler, where the traceback no longer holds tensors
        raise NoRoom("memory ran out beside what replayed steps keep")
