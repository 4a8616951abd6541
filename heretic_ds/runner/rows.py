"""A row: one prompt under one trial on its way to its answer. When answers end, and which rows make up a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from heretic_ds import progress
from heretic_ds.progress import Work
from heretic_ds.prompts import TokenRows
from heretic_ds.scoring.base import Decided

PASS_IN_TOKENS = 192
"""Padding tokens that one more forward pass is worth.

A pass costs its launches and the reading of all weights beside its tokens: about 60 tokens' time for a tiny model on a
CPU, hardly any for a larger one there, and a few hundred for a model of 8 billion parameters on a GPU.
"""

_DECIDE_EVERY = 4
"""Tokens between two questions to the scorers: turning tokens into text costs about as much as a small model's step."""


@dataclass(eq=False, slots=True)
class Row:
    """The one thing that travels from a caller's list of prompts through passes and steps to its answer."""

    prompt: Sequence[int]
    index: int = 0
    """Of the prompt in the caller's list."""
    trial: int = 0
    """Position of its edit among those of the pass."""
    answer: list[int] = field(default_factory=list)
    """Tokens so far, without an end token."""
    done: bool = False

    def begin(self) -> None:
        """Forget the answer: it begins anew."""
        self.answer, self.done = [], False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def rows_of(prompts: TokenRows, trials: int = 1) -> list[Row]:
    """A row for every prompt under every trial, the longest prompts first: memory runs out at once, if ever."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [Row(prompts[index], index, trial) for index in order for trial in range(trials)]


@dataclass(frozen=True)
class Stop:
    """When an answer ends."""

    ends: Collection[int]
    """Token ids that end it."""
    limit: int
    """Tokens of the longest answer."""
    decided: Decided | None = None
    """Ends it as soon as its scores can no longer change."""

    def note(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[Row]:
        """Take the next token of each row that is not done; gives the rows that end with it."""
        going, asked = [row for row in rows if not row.done], []
        for row, token in zip(rows, tokens, strict=True):
            if row.done:
                continue
            if token in self.ends:
                row.done = True
                continue
            row.answer.append(token)
            row.done = len(row.answer) >= self.limit
            if not row.done and len(row.answer) % _DECIDE_EVERY == 0:
                asked.append(row)
        if self.decided is not None and asked:
            for row, verdict in zip(asked, self.decided([row.answer for row in asked]), strict=True):
                row.done = verdict
        return [row for row in going if row.done]


def answering(rows: Sequence[Row], limit: int) -> AbstractContextManager[Work]:
    """Work in hand: answers of at most ``limit`` tokens, by the tokens that they have, whoever adds to them."""
    return progress.work("answers", len(rows), "answers", lambda: sum(_share(row, limit) for row in rows))


def _share(row: Row, limit: int) -> float:
    return 1.0 if row.done else len(row.answer) / limit


def first_cut(lengths: Sequence[int]) -> int:
    """How many of the first rows, of descending ``lengths``, should be a batch of their own.

    The rest is left out where that saves more padding than a pass costs. All of them where nothing saves as much.
    """
    stop = len(lengths)
    while True:
        steps = [at for at in range(1, stop) if lengths[at] != lengths[at - 1]]
        saving, cut = max((((stop - at) * (lengths[0] - lengths[at]), at) for at in steps), default=(0, stop))
        if saving <= PASS_IN_TOKENS:
            return stop
        stop = cut


def batches_of(lengths: Sequence[int]) -> list[range]:
    """All rows, of descending ``lengths``, in batches as :func:`first_cut` makes them."""
    start, batches = 0, []
    while start < len(lengths):
        stop = start + first_cut(lengths[start:])
        batches.append(range(start, stop))
        start = stop
    return batches
