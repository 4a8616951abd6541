"""Greedy decoding: as few steps, rows and tokens as the answers need.

Works over the model's own cache classes, so that every attention kind (full, sliding, linear, convolution) decodes. A
row that is done makes room for the next prompt where the cache takes rows while it is in use; elsewhere, and when no
prompts are left, the batch shrinks.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.prompts import TokenRows
from heretic_ds.runner.caches import RoomyLayer, join_rows, new_cache, pad_columns, takes_rows
from heretic_ds.runner.forward import Forward, Prefill
from heretic_ds.runner.padding import batches_of
from heretic_ds.scoring.base import Decided

OnRows = Callable[[Sequence[int]], None]
"""Told before a forward pass, whenever the rows of the batch have changed, which prompt each of them answers."""

_DECIDE_EVERY = 4
"""Tokens between two questions to the scorers: turning tokens into text costs about as much as a small model's step."""

COMPACT_BELOW = 0.75
"""Share of live rows in a batch below which the others' rows leave it, or are given to the next prompts."""


class Answers:
    """The answers to a list of prompts, as far as they have got."""

    def __init__(self, count: int, ends: Collection[int], max_new_tokens: int, decided: Decided | None) -> None:
        self._ends, self._decided = ends, decided
        self.limit = max_new_tokens
        """Tokens of the longest answer."""
        self.of: list[list[int]] = [[] for _ in range(count)]
        """By prompt."""

    def note(self, rows: Sequence[int], live: list[bool], tokens: Sequence[int]) -> list[int]:
        """Note the next token of each row that is live, and in ``live`` those that end with it; gives their prompts."""
        before, asked = places(live), []
        for position in before:
            answer = self.of[rows[position]]
            if tokens[position] in self._ends:
                live[position] = False
                continue
            answer.append(tokens[position])
            live[position] = len(answer) < self.limit
            if live[position] and len(answer) % _DECIDE_EVERY == 0:
                asked.append(position)
        if self._decided is not None and asked:
            verdicts = self._decided([self.of[rows[position]] for position in asked])
            for position, verdict in zip(asked, verdicts, strict=True):
                live[position] = not verdict
        return [rows[position] for position in before if not live[position]]


def places(live: Sequence[bool]) -> list[int]:
    """Positions of what is true."""
    return [position for position, each in enumerate(live) if each]


class _Batch:
    """Rows in flight, each with its next token, which the model has not seen yet."""

    def __init__(self, rows: list[int], token_B: Tensor, mask_BS: Tensor, position_B1: Tensor, cache: DynamicCache):
        self.rows = rows
        """The prompt that each row answers."""
        self.live = [True] * len(rows)
        self.ended: list[int] = []
        """Prompts whose answers have ended since this was last asked for."""
        self.token_B, self.mask_BS, self.position_B1, self.cache = token_B, mask_BS, position_B1, cache

    @property
    def going(self) -> list[int]:
        """Positions of the rows that go on."""
        return places(self.live)

    def take_ended(self) -> list[int]:
        """The prompts whose answers have ended since the last call."""
        ended, self.ended = self.ended, []
        return ended

    def keep(self, positions: Sequence[int]) -> None:
        """Leave the rows at ``positions``."""
        keep_B = self._positions(positions)
        self.cache.reorder_cache(keep_B)  # type: ignore[arg-type]  # transformers says LongTensor
        self.token_B, self.mask_BS = self.token_B[keep_B], self.mask_BS[keep_B]
        self.position_B1 = self.position_B1[keep_B]
        self._keep_rows(positions)

    def shrink(self, positions: Sequence[int], width: int) -> None:
        """Leave the rows at ``positions``, in another order: few of them are moved, the others stay in their memory."""
        count = len(positions)
        order, holes = list(range(count)), sorted(set(range(count)) - set(positions))
        moved = [position for position in positions if position >= count]
        for hole, position in zip(holes, moved, strict=True):
            order[hole] = position
        origin_N, target_N, order_B = map(self._positions, (moved, holes, order))
        for layer in self.cache.layers:
            if isinstance(layer, RoomyLayer):
                layer.shrink(origin_N, target_N, count, width)
        self.token_B, self.position_B1 = self.token_B[order_B], self.position_B1[order_B]
        self.mask_BS = self.mask_BS[order_B][:, -width:]
        self._keep_rows(order)

    def refill(self, positions: Sequence[int], added: Sequence[_Batch], width: int) -> None:
        """Leave the rows at ``positions`` and append those of other batches; none uses more than ``width`` columns."""
        keep_B = self._positions(positions)
        join_rows(self.cache, positions, [other.cache for other in added], width)
        self.token_B = torch.cat([self.token_B[keep_B], *(other.token_B for other in added)])
        self.position_B1 = torch.cat([self.position_B1[keep_B], *(other.position_B1 for other in added)])
        masks = [self.mask_BS[keep_B], *(other.mask_BS for other in added)]
        self.mask_BS = torch.cat([pad_columns(mask_BS, width) for mask_BS in masks])
        self._keep_rows(positions)
        for other in added:
            self.rows, self.live = self.rows + other.rows, self.live + other.live
            self.ended += other.take_ended()

    def _positions(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(positions, dtype=torch.int64, device=self.token_B.device)

    def _keep_rows(self, positions: Sequence[int]) -> None:
        self.rows, self.live = [self.rows[p] for p in positions], [self.live[p] for p in positions]


class _Decoder:
    """One run over a list of prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: TokenRows,
        prefill: Prefill,
        answers: Answers,
        on_rows: OnRows | None,
        refills: bool,
    ) -> None:
        self._model, self._forward, self._prefill = model, Forward(model), prefill
        self._prompts, self._answers, self._on_rows = prompts, answers, on_rows
        self.refills = refills and takes_rows(new_cache(model, roomy=True))
        """Whether rows join a batch in flight."""
        self._announced: list[int] = []

    def begin(self, rows: list[int]) -> list[_Batch]:
        """Prompts with the first token of each answer; in several batches where that saves padding."""
        if not self.refills:
            return [self._begin(rows)]
        rows = sorted(rows, key=lambda row: -len(self._prompts[row]))
        return [self._begin(rows[part.start : part.stop]) for part in batches_of([len(self._prompts[r]) for r in rows])]

    def _begin(self, rows: list[int]) -> _Batch:
        self._announce(rows)
        cache = new_cache(self._model, roomy=self.refills)
        begun = self._prefill([self._prompts[row] for row in rows], cache)
        batch = _Batch(rows, begun.logits_BV.argmax(dim=-1), begun.mask_BS, begun.position_B1, cache)
        self._note(batch)
        return batch

    def keep(self, batch: _Batch, positions: Sequence[int], added: Sequence[_Batch] = ()) -> None:
        """Leave the rows at ``positions`` and append those of other batches."""
        if not self.refills:
            batch.keep(positions)
            return
        rows = [batch.rows[position] for position in positions] + [row for other in added for row in other.rows]
        width = max(len(self._prompts[row]) + max(len(self._answers.of[row]), 1) - 1 for row in rows)
        if added:
            batch.refill(positions, added, width)
        else:
            batch.shrink(positions, width)

    def step(self, batch: _Batch) -> None:
        """The next token of every row."""
        self._announce(batch.rows)
        batch.mask_BS = torch.cat([batch.mask_BS, batch.mask_BS.new_ones(len(batch.rows), 1)], dim=1)
        batch.position_B1 = batch.position_B1 + 1
        logits_BV = self._forward(
            batch.token_B[:, None], batch.mask_BS, batch.position_B1, past_key_values=batch.cache, use_cache=True
        )
        batch.token_B = logits_BV.argmax(dim=-1)
        self._note(batch)

    def _announce(self, rows: list[int]) -> None:
        if self._on_rows is not None and rows != self._announced:
            self._on_rows(rows)
            self._announced = list(rows)

    def _note(self, batch: _Batch) -> None:
        """Note each live row's new token in its answer, and which rows end with it."""
        batch.ended += self._answers.note(batch.rows, batch.live, batch.token_B.tolist())


@torch.inference_mode()
def finished_answers(
    model: PreTrainedModel,
    prompts: TokenRows,
    pad_id: int,
    ends: Collection[int],
    max_new_tokens: int,
    decided: Decided | None = None,
    anyone: Callable[[bool], bool] = bool,
    rows_at_once: int | None = None,
    on_rows: OnRows | None = None,
    prefill: Prefill | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy answers (index of the prompt, tokens without the end token) in the order in which they end.

    At most ``rows_at_once`` rows (None: all) are in flight. ``prefill`` passes over the prompts, by default from their
    first token through the whole model. The other arguments are those of :func:`decode`.
    """
    answers = Answers(len(prompts), ends, max_new_tokens, decided)
    prefill = prefill or Prefill(model, pad_id)
    decoder = _Decoder(model, prompts, prefill, answers, on_rows, refills=rows_at_once is not None)
    most, waiting = rows_at_once or len(prompts), list(range(len(prompts)))
    batch: _Batch | None = None
    while True:
        going = [] if batch is None else batch.going
        if batch is not None:
            for row in batch.take_ended():
                yield row, answers.of[row]
            if not anyone(bool(going or waiting)):
                return
        if waiting and (not going or (decoder.refills and len(going) <= COMPACT_BELOW * most)):
            free = most - len(going)
            added, waiting = decoder.begin(waiting[:free]), waiting[free:]
            if batch is None or not going:
                batch, *added = added
                going = list(range(len(batch.rows)))
            if added:
                decoder.keep(batch, going, added)
            continue
        if batch is None:
            raise ValueError("no prompts were given to answer")
        if max(len(going), 1) <= COMPACT_BELOW * len(batch.rows):
            decoder.keep(batch, going or [0])
        decoder.step(batch)


def decode(
    model: PreTrainedModel,
    prompts: TokenRows,
    pad_id: int,
    ends: Collection[int],
    max_new_tokens: int,
    decided: Decided | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Greedy answers to one batch of prompts, without their end token.

    A row stops at an end token, after ``max_new_tokens``, or as soon as ``decided`` says that its scores can no longer
    change. Stopped rows leave the batch once they are a quarter of it. Where ranks decode in step, ``anyone`` tells
    whether any of them has a row that goes on; until none has, a rank without one keeps the first row of its batch.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for row, answer in finished_answers(model, prompts, pad_id, ends, max_new_tokens, decided, anyone):
        answers[row] = answer
    return answers


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends an answer, by the model's generation config and by its tokenizer."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids: Sequence[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
