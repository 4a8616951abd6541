"""Greedy decoding: as few steps, rows and tokens as the answers need.

Rows lie in slots, whose places are given to the next prompts as answers end (:class:`_SlotRun`); on CUDA steps are
captured and replayed. Models whose caches hold more than keys and values, and ranks that run in lockstep, decode batch
by batch over the model's own cache, from which rows leave as they end (:func:`shrinking`).

On CUDA the host is one step behind: while the device computes a step, the tokens of the step before it are read, and
scorers asked. A row that has ended is noticed one step late, and what it answers in that step is discarded.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.memory import is_out_of_memory, release_memory
from heretic_ds.runner import graphs, slots
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.graphs import CannotCapture, Graphs
from heretic_ds.runner.parity import is_rounding, slot_distances
from heretic_ds.runner.rows import Row, Stop, batches_of
from heretic_ds.runner.slots import Slots

log = logging.getLogger(__name__)

COMPACT_BELOW = 0.75
"""Share of live rows in a batch below which the others' rows leave it, or are given to the next prompts."""
_AHEAD = {"cuda": 1}
"""Steps that a device may have been given beyond those whose tokens have been read."""
_ROOM = 32
"""Columns for which slots take memory at once, where it may move."""
_HALVINGS = 2
"""Times that fewer rows are tried where memory runs out beside graphs, before these are given up."""
_NOBODY = Row((), done=True)


class Decoder:
    """All ways to the answers of one model's prompts."""

    def __init__(self, forward: Forward, anatomy: Anatomy, rows_move: bool = True, cuda_graphs: bool = False) -> None:
        """``rows_move``: whether rows may come and go in a batch at all; ``cuda_graphs``: whether steps are to be
        captured where the device has graphs."""
        self._forward, self._anatomy = forward, anatomy
        self._obstacle = None if rows_move else "ranks wait for each other, or have kernels of their own"
        self.settled = not rows_move
        """Whether it is known if rows can lie in slots."""
        self._new_maker = graphs.makers_for(forward.device) if cuda_graphs else None
        self._graphs: Graphs | None = None
        self._halvings, self._too_many = _HALVINGS, 0
        """Rows for which memory ran out in these steps, if it was there that it ran out last."""

    def settle(self) -> None:
        """Find out, once, whether rows can lie in slots: one step over them is compared with one over the model's own
        cache. No edits of outputs may be active; memory that runs out is the caller's to deal with."""
        if self.settled:
            return
        if found := slots.obstacle(self._forward) or self._difference():
            self.without_slots(found)
        elif found := graphs.obstacle(self._forward, self._anatomy):
            self._give_up_graphs(found)
        self.settled = True

    def _difference(self) -> str | None:
        try:
            error, rounding = slot_distances(self._forward)
        except Exception as failure:  # of the model's own code, which was not written for such a cache or mask
            if is_out_of_memory(failure):
                raise
            return f"a trial step failed ({type(failure).__name__}: {first_line(failure)})"
        if is_rounding(error, rounding):
            return None
        return f"a trial step gave other logits (off by {error:.2g} of their spread)"

    def without_slots(self, reason: str) -> None:
        """Decode batch by batch from now on."""
        self.settled, self._obstacle = True, reason
        log.info("answers are decoded batch by batch: %s", reason)
        self._give_up_graphs(reason)

    @property
    def moves_rows(self) -> bool:
        """Whether rows come and go one by one, so that :meth:`answers` serves; else :func:`shrinking` does."""
        return self._obstacle is None

    @property
    def captures(self) -> bool:
        """Whether steps are captured, so that edits have to lie in memory that stays."""
        return self._new_maker is not None and self.moves_rows

    @torch.inference_mode()
    def answers(self, rows: Sequence[Row], stop: Stop, at_once: int, edits: int | None = 0) -> Iterator[Row]:
        """Answer rows, at most ``at_once`` at a time, and give each as it ends.

        ``edits``: :meth:`Graphs.replay`; None for a sample, which is not worth capturing steps of its size.
        """
        while left := [row for row in rows if not row.done]:
            for row in left:
                row.begin()
            most, failure = min(at_once, len(left)), None
            captured = None if edits is None else self._reserved(most, max(map(len, left)) + stop.limit)
            if captured is not None:
                captured.forget(below=edits or 0)
            try:
                yield from _SlotRun(self._forward, captured, edits or 0, left, stop, most).run()
                return
            except CannotCapture as caught:
                failure = str(caught)
            except Exception as caught:
                if is_out_of_memory(caught):
                    self._too_many = min(most, sum(not row.done for row in left))
                raise
            del captured
            self._give_up_graphs(failure)  # outside the handler, where the traceback no longer holds tensors

    def _reserved(self, rows: int, columns: int) -> Graphs | None:
        """Graphs over slots of at least such a size; None where steps are not captured."""
        if self._new_maker is None:
            return None
        have = self._graphs
        if have is not None and (have.slots.rows < rows or have.slots.columns < columns):
            rows, columns = max(rows, have.slots.rows), max(columns, have.slots.columns)
            have = self._graphs = None
        if have is None:
            have = self._graphs = Graphs(Slots(self._forward, rows, graphs.rounded(columns)), self._new_maker)
        return have

    def _give_up_graphs(self, reason: str) -> None:
        """Go on without captured steps, and say why, where they were to be expected; memory is given back."""
        if self._new_maker is not None:
            log.warning("decoding without CUDA graphs: %s", reason)
        self._new_maker = None
        self.rest()

    def evict(self) -> bool:
        """Give back memory where it has run out; False where fewer rows have to be tried."""
        rows, self._too_many = self._too_many, 0
        if self._graphs is None:
            return False
        self.rest()
        if rows > 1 and self._halvings:
            self._halvings -= 1
            return False
        self._give_up_graphs("memory ran out beside what captured steps keep")
        return True

    def rest(self) -> None:
        """Free slots and graphs, which are made anew when rows come; for when none are in flight."""
        if self._graphs is not None:
            self._graphs = None
            release_memory()

    def forget(self) -> None:
        """Drop what was captured: the edits that it refers to are no longer there."""
        if self._graphs is not None:
            self._graphs.forget()


class _SlotRun:
    """One run over a list of rows."""

    def __init__(
        self, forward: Forward, captured: Graphs | None, edits: int, rows: Sequence[Row], stop: Stop, most: int
    ) -> None:
        """``captured`` steps have slots of their own; without them slots last for this run."""
        self._forward, self._captured, self._edits, self._stop, self._most = forward, captured, edits, stop, most
        self._slots = Slots(forward, most, 0) if captured is None else captured.slots
        self._waiting = list(rows)
        self._at = [_NOBODY] * self._slots.rows
        """The row in each slot, or that which was there last."""
        self._told: list[Row] = []
        self._ahead = _AHEAD.get(self._slots.device.type, 0)
        self._unread: deque[Callable[[], list[int]]] = deque()
        self._ended: list[Row] = []

    def run(self) -> Iterator[Row]:
        """Rows as their answers end."""
        while True:
            ended, self._ended = self._ended, []
            yield from ended
            going = [slot for slot, row in enumerate(self._at) if not row.done]
            if self._waiting and len(going) <= COMPACT_BELOW * self._most:
                self._settled(self._fill)
            elif not going:
                return
            elif self._is_sparse(len(going), going[-1] + 1):
                self._settled(self._move_together)
            elif all(len(self._at[slot].answer) + len(self._unread) >= self._stop.limit for slot in going):
                self._read()  # no row needs another step
            else:
                self._step(going[-1] + 1)

    def _settled(self, change: Callable[[], None]) -> None:
        """Change the rows, or first read what they have answered: by that, other rows may have to change."""
        if self._unread:
            self._read()
        else:
            change()

    def _is_sparse(self, live: int, slots: int) -> bool:
        """Whether rows that are moved together make a step so much smaller that it is worth it."""
        if self._captured is None:
            return live <= COMPACT_BELOW * slots
        return self._captured.pad(live, 1)[0] < self._captured.pad(slots, 1)[0]

    def _columns(self) -> int:
        """Columns that live rows use once they have taken the next step."""
        return max((len(row) for row in self._at if not row.done), default=0) + len(self._unread)

    def _step(self, rows: int) -> None:
        slots, columns = self._slots, self._columns()
        if self._captured is None:
            slots.reserve(0, graphs.rounded(columns, _ROOM))
        else:
            rows, columns = self._captured.pad(rows, columns)
        if self._at[:rows] != self._told:
            self._told = self._at[:rows]
            self._forward.assign(self._told, None if self._captured is None else slots.trial_R[:rows])
        if self._captured is None:
            slots.answer(rows, columns)
        else:
            self._captured.replay(rows, columns, self._edits)
        slots.advance(rows)
        self._unread.append(read_later(slots.next_R[:rows]))
        if len(self._unread) > self._ahead:
            self._read()

    def _read(self) -> None:
        """Note the tokens of the oldest step that has not been read."""
        tokens = self._unread.popleft()()
        # Rows lie where they lay when the step was taken: they change when everything has been read.
        self._ended += self._stop.note(self._at[: len(tokens)], tokens)

    def _fill(self) -> None:
        """Give free slots to the next prompts, with the first token of each answer."""
        free = [slot for slot, row in enumerate(self._at[: self._most]) if row.done]
        rows, self._waiting = self._waiting[: len(free)], self._waiting[len(free) :]
        rows = sorted(rows, key=lambda row: -len(row.prompt))
        for part in batches_of([len(row.prompt) for row in rows]):
            self._begin(rows[part.start : part.stop], free[part.start : part.stop])

    def _begin(self, rows: list[Row], slots: list[int]) -> None:
        self._told = []  # those of the next step have to be told again after these
        if self._captured is None:
            self._slots.reserve(0, graphs.rounded(len(rows[0].prompt) + 1, _ROOM))
        cache = self._forward.growing_cache()
        begun = self._forward(rows, cache)
        token_N = begun.logits_BV.argmax(dim=-1)
        self._slots.join(begun, cache, token_N, slots)
        self._ended += self._stop.note(rows, token_N.tolist())
        for row, slot in zip(rows, slots, strict=True):
            self._at[slot] = row

    def _move_together(self) -> None:
        """Move rows from the last slots into free ones among the first, so that a smaller step holds them all."""
        count = sum(not row.done for row in self._at)
        origins = [slot for slot, row in enumerate(self._at) if slot >= count and not row.done]
        targets = [slot for slot in range(count) if self._at[slot].done]
        self._slots.move(origins, targets, self._columns())
        for origin, target in zip(origins, targets, strict=True):
            self._at[target], self._at[origin] = self._at[origin], _NOBODY


@torch.inference_mode()
def shrinking(forward: Forward, rows: Sequence[Row], stop: Stop, anyone: Callable[[bool], bool] = bool) -> None:
    """Answer one batch over the model's own cache; rows that are done leave it once they are a quarter of it.

    Parts of a batch take turns, each as a batch of its own: while one waits for its tokens, the others' passes run.
    Where ranks decode in lockstep, ``anyone`` tells whether any of them has a row that goes on; until none has, a rank
    without one keeps the first row of its batch.
    """
    going = deque(_turns(forward, part, stop, anyone) for part in forward.parts(rows))
    while going:
        turns = going.popleft()
        if next(turns, False):
            going.append(turns)


def _turns(forward: Forward, rows: Sequence[Row], stop: Stop, anyone: Callable[[bool], bool]) -> Iterator[bool]:
    """A part's passes, one a turn; it pauses while its tokens are under way."""
    batch, cache = list(rows), forward.own_cache()
    begun = forward(batch, cache)
    mask_BS, position_B1, tokens = begun.mask_BS, begun.position_B1, forward.choose(begun.logits_BV)
    yield True
    token_B = tokens()
    stop.note(batch, token_B.tolist())
    while anyone(any(not row.done for row in batch)):
        keep = [place for place, row in enumerate(batch) if not row.done] or [0]
        if len(keep) <= COMPACT_BELOW * len(batch):
            keep_B = torch.tensor(keep, device=token_B.device)
            cache.reorder_cache(keep_B)  # type: ignore[arg-type]  # transformers says LongTensor
            token_B, mask_BS, position_B1 = token_B[keep_B], mask_BS[keep_B], position_B1[keep_B]
            batch = [batch[place] for place in keep]
        forward.assign(batch)  # another part had its turn since
        mask_BS, position_B1 = torch.cat([mask_BS, mask_BS.new_ones(len(batch), 1)], dim=1), position_B1 + 1
        tokens = forward.choose(forward.logits(token_B[:, None], mask_BS, position_B1, cache))
        yield True
        token_B = tokens()
        stop.note(batch, token_B.tolist())


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


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends an answer, by the model's generation config and by its tokenizer."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids: Sequence[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
