"""An engine whose ranks work on prompts of their own, but cannot run a forward pass without each other.

All ranks run equally many passes: shares of prompts are padded to one length, batches have one size, and answers are
decoded until no rank has any that goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.decode import OnRows, finished_answers
from heretic_ds.runner.engine import ResidentEngine
from heretic_ds.runner.memory import is_out_of_memory, too_large
from heretic_ds.scoring.base import Decided

if TYPE_CHECKING:
    from heretic_ds.job import Job


class InStepEngine(ResidentEngine):
    """Every rank has its own share of the prompts; the model's weights lie over ``degree`` ranks."""

    _retries = False

    def __init__(
        self, name: str, model: PreTrainedModel, anatomy: Anatomy, job: Job, degree: int, editor: WeightEditor
    ) -> None:
        """``name`` is the placement's."""
        generation, world = job.settings.generation, job.world
        super().__init__(
            model,
            job.opened.tokenizer,
            anatomy,
            generation.max_new_tokens,
            generation.batch_size,
            editor=editor,
            replicas=world.replicas(1, "degree"),  # of the prompts
            same=world.same,
        )
        self._name, self._degree = name, degree
        self._sizing = replace(self._sizing, least=lambda rows: min(world.gather(rows)))

    @property
    def degree(self) -> int:
        return self._degree

    def capture(self, prompts: TokenRows, winsorize_quantile: float = 1.0) -> Tensor:
        with self._in_step("capture"):
            return super().capture(prompts, winsorize_quantile)

    def reference(self, prompts: TokenRows) -> Tensor:
        with self._in_step("kl"):
            return super().reference(prompts)

    def kl(self, prompts: TokenRows, reference: Tensor, edits: Sequence[Edit | None]) -> list[float]:
        with self._in_step("kl"):
            return super().kl(prompts, reference, edits)

    def _residuals(self, decoder: nn.Module, rows: TokenRows) -> Tensor:
        with self._in_step("capture", len(rows)):
            return super()._residuals(decoder, rows)

    def _first_token_logits(self, rows: TokenRows) -> Tensor:
        with self._in_step("kl", len(rows)):
            return super()._first_token_logits(rows)

    def _decode(self, rows: TokenRows, max_new_tokens: int, decided: Decided | None) -> list[list[int]]:
        return self._answers(rows, max_new_tokens, decided)

    def _answers(
        self, rows: TokenRows, max_new_tokens: int, decided: Decided | None, on_rows: OnRows | None = None
    ) -> list[list[int]]:
        """Answers to one batch, decoded until no rank has any that goes on."""
        answers: list[list[int]] = [[] for _ in rows]
        with self._in_step("generate", len(rows)):
            for row, answer in finished_answers(
                self.model, rows, self._pad_id, self._ends, max_new_tokens, decided, self._anyone, on_rows=on_rows
            ):
                answers[row] = answer
        return answers

    def _answers_of_pass(
        self, rows: TokenRows, trials: int, assign: OnRows, decided: Decided | None
    ) -> list[list[list[int]]]:
        pairs, size = self._pairs(rows, trials), self.batch_sizes["generate"]
        answers: list[list[list[int]]] = [[[] for _ in rows] for _ in range(trials)]
        for batch in (pairs[start : start + size] for start in range(0, len(pairs), size)):
            found = self._answers(
                [rows[index] for _, index in batch],
                self._max_new_tokens,
                decided,
                partial(_assign, assign, [trial for trial, _ in batch]),
            )
            for (trial, index), answer in zip(batch, found, strict=True):
                answers[trial][index] = answer
        return answers

    def _anyone(self, going: bool) -> bool:
        """Whether any rank's rows go on."""
        return self._replicas.total(torch.tensor(float(going))).item() > 0

    @contextmanager
    def _in_step(self, phase: str, rows: int | None = None) -> Iterator[None]:
        """A rank that ran out of memory cannot try again by itself: the others wait for its part of the pass.

        ``rows`` are those of the batch; by default as many as batches of the phase have.
        """
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows = rows or self.batch_sizes.get(phase, 1)
            if rows == 1:
                raise too_large(phase) from error
            raise UserError(
                f"memory ran out with {rows} rows in a batch ({phase}), from which {self._name} cannot recover; "
                f"set generation.batch_size below {rows}"
            ) from error


def _assign(assign: OnRows, trials: Sequence[int], rows: Sequence[int]) -> None:
    """Name the trial of each row that is left of a batch."""
    assign([trials[row] for row in rows])
