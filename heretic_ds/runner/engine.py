"""An engine over a model that runs through ordinary forward passes of this process, however its weights lie.

Placements build on it: they lay the weights out, and say how a writer's weight is edited there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.ablation import Ablation, Edit, ResidualMeans, winsorize
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.edits.outputs import OutputEdits, obstacle
from heretic_ds.edits.tables import table_budget
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.prompts import TokenRows, pad_left
from heretic_ds.runner.batch_sizes import PROBE_TOKENS, BatchSizing
from heretic_ds.runner.decode import decode, end_tokens
from heretic_ds.runner.host_memory import give_back_memory, keep_freed_blocks, return_freed_blocks
from heretic_ds.runner.memory import in_batches, prepared, release_memory, with_fewer_rows
from heretic_ds.runner.padding import first_cut
from heretic_ds.runner.replays import Replays
from heretic_ds.runner.reuse import HeadStart
from heretic_ds.runner.slot_decoding import Assign
from heretic_ds.runner.taps import tapped
from heretic_ds.scoring.base import Decided
from heretic_ds.scoring.kl import first_token_kl, log_probabilities
from heretic_ds.world import ALONE, Replicas

log = logging.getLogger(__name__)

MOST_EDITS = 64
"""Most edits of one pass where outputs are edited."""


class ResidentEngine:
    """Edits are made in the weights themselves one at a time, or in outputs many at a time."""

    max_edits_per_pass = 1
    """As many as rows of one batch may have where outputs can be edited."""
    _retries = True
    """Whether a batch that ran out of memory can be tried again here, whatever other ranks do."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        anatomy: Anatomy,
        max_new_tokens: int,
        batch_size: int = 0,
        editor: WeightEditor | None = None,
        replicas: Replicas = ALONE,
        same: Callable[[float], float] = lambda value: value,
        cuda_graphs: bool = False,
        prefill_reuse: bool = False,
    ) -> None:
        """Rows per batch are ``batch_size``, or for 0 what is measured, unless :attr:`batch_sizes` is given them.

        ``editor`` is the placement's way to edit its weights; by default they lie whole in this process. ``replicas``
        says which prompts are this one's work, ``same`` makes one rank's number that of all ranks. With ``cuda_graphs``
        steps of decoding are replayed where the device and the model allow it; the placement must have no collectives.
        With ``prefill_reuse`` passes of edited models over prompts leave out what is the original model's, where the
        model allows it.
        """
        self.model, self.anatomy = model, anatomy
        self.whole: LoadedModel | None = None
        self._replicas = replicas
        self._pad_id = tokenizer.pad_token_id
        self._ends = end_tokens(model, tokenizer)
        self._max_new_tokens = max_new_tokens
        self._editor = editor or WeightEditor(model, anatomy)
        self._outputs: OutputEdits | None = None
        self._obstacle = None if self._whole_batches else obstacle(model, anatomy)
        if not self._whole_batches and self._obstacle is None:
            self.max_edits_per_pass = MOST_EDITS
        self._applied: Edit | None = None
        self._replays = Replays(model, anatomy, wanted=cuda_graphs)
        self._prefill = HeadStart(model, anatomy, self._pad_id, prefill_reuse, replicas)
        self._keeps_blocks = prefill_reuse and self._device.type == "cpu"
        if self._keeps_blocks:
            keep_freed_blocks()
        self._sizing = BatchSizing(self._device, max_new_tokens, self._prefill.wanted, same)
        self.batch_sizes: dict[str, int] = (
            dict.fromkeys(("capture", "kl", "generate"), batch_size) if batch_size else {}
        )

    @property
    def degree(self) -> int:
        return self._replicas.degree

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.inference_mode()
    def capture(self, prompts: TokenRows, winsorize_quantile: float = 1.0) -> Tensor:
        decoder = self.model.get_submodule(self.anatomy.decoder)
        rows, own = self._share(prompts), self._replicas.own(len(prompts))
        means = ResidualMeans()
        self._find_batch_size("capture", rows, lambda batch: self._residuals(decoder, batch))
        for indices, residual_BLD in self._sorted_batches(
            "capture", rows, lambda batch: self._residuals(decoder, batch)
        ):
            counted = [position for position, index in enumerate(indices) if index < own]
            kept_BLD = residual_BLD[counted].float()
            means.update(winsorize(kept_BLD, winsorize_quantile) if counted else kept_BLD)
        return means.mean(self._replicas.total)

    @property
    def _whole_batches(self) -> bool:
        """Whether the placement has a way of its own to decode a batch, so that rows must not come and go in it, and
        outputs are its own business."""
        return type(self)._decode is not ResidentEngine._decode

    def prepare(self, ablation: Ablation) -> None:
        self._applied = None
        self._replays.forget()
        self._editor.prepare(ablation)
        if self._whole_batches:
            return
        if self._obstacle is not None:
            log.info("every trial has passes of its own: %s", self._obstacle)
            return
        outputs = OutputEdits(self.model, self.anatomy, ablation, self._editor.reduce, self._table_budget())
        self._outputs, self.max_edits_per_pass = outputs, min(MOST_EDITS, outputs.most_edits)

    def _table_budget(self) -> int:
        """The same on all ranks, which compute tables of edits together."""
        return int(self._sizing.same(table_budget(self.model)))

    @torch.inference_mode()
    def reference(self, prompts: TokenRows) -> Tensor:
        """Log-probabilities [N, V] of the first answer token for the prompts of this replica, float32, on the host."""
        self._editor.set_edit(self._applied)
        rows = self._share(prompts)
        self._find_batch_size("kl", rows, self._first_token_logits)
        logp_NV: Tensor | None = None
        for indices, logits_BV in self._sorted_batches("kl", rows, self._first_token_logits):
            logp_BV = log_probabilities(logits_BV).cpu()
            if logp_NV is None:
                logp_NV = logp_BV.new_empty(len(rows), logp_BV.shape[-1])
            logp_NV[indices] = logp_BV
        if logp_NV is None:
            raise ValueError("no prompts were given to take reference distributions from")
        return logp_NV

    @torch.inference_mode()
    def kl(self, prompts: TokenRows, reference: Tensor, edits: Sequence[Edit | None]) -> list[float]:
        rows, result = self._share(prompts), []
        self._learn("kl", rows, edits)
        for together in self._passes(edits):
            with self._wearing(together, "kl", rows) as assign:
                kl_TN = self._kl_of_pass(rows, reference, len(together), assign)
            result += [math.fsum(self._replicas.gather(kl_N, len(prompts))) / len(prompts) for kl_N in kl_TN]
        return result

    def _kl_of_pass(self, rows: TokenRows, reference: Tensor, trials: int, assign: Assign) -> list[list[float]]:
        """KL divergences [trial][prompt]."""
        pairs = self._pairs(rows, trials)
        kl_TN = [[0.0] * len(rows) for _ in range(trials)]

        def divergences(batch: Sequence[tuple[int, int]]) -> list[float]:
            assign([trial for trial, _ in batch])
            logits_BV = self._first_token_logits([rows[index] for _, index in batch])
            reference_BV = reference[[index for _, index in batch]].to(logits_BV.device)
            return first_token_kl(reference_BV, logits_BV).tolist()

        def cut(batch: Sequence[tuple[int, int]]) -> int:
            return self._cut([rows[index] for _, index in batch])

        for start, kl_B in in_batches(pairs, self.batch_sizes, "kl", divergences, cut, self._retries):
            for (trial, index), kl in zip(pairs[start:], kl_B, strict=False):
                kl_TN[trial][index] = kl
        return kl_TN

    def generate(
        self, prompts: TokenRows, edits: Sequence[Edit | None], decided: Decided | None = None
    ) -> list[list[list[int]]]:
        rows, result = self._share(prompts), []
        if "generate" not in self.batch_sizes:
            self._editor.set_edit(self._applied)
            self._find_batch_size("generate", rows, lambda batch: self._decode(batch, PROBE_TOKENS, None))
        self._learn("generate", rows, edits)
        for together in self._passes(edits):
            with self._wearing(together, "generate", rows, steady=self._replays.steps() is not None) as assign:
                answers = self._answers_of_pass(rows, len(together), assign, decided)
            result += [self._replicas.gather(of_trial, len(prompts)) for of_trial in answers]
        return result

    def _answers_in_batches(self, rows: TokenRows, decided: Decided | None) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in rows]
        for indices, batch in self._sorted_batches(
            "generate", rows, lambda batch: self._decode(batch, self._max_new_tokens, decided)
        ):
            for index, answer in zip(indices, batch, strict=True):
                answers[index] = answer
        return answers

    def _answers_of_pass(
        self, rows: TokenRows, trials: int, assign: Assign, decided: Decided | None
    ) -> list[list[list[int]]]:
        """Answers [trial][prompt][token]; where memory runs out, those that are unfinished begin anew."""
        if self._whole_batches:
            return [self._answers_in_batches(rows, decided)]
        answers: dict[tuple[int, int], list[int]] = {}
        pairs = self._pairs(rows, trials)

        kind = 0 if self._outputs is None else self._outputs.kind

        def go_on(most: int) -> None:
            left = [pair for pair in pairs if pair not in answers]
            for position, answer in self._replays.finished_answers(
                [rows[index] for _, index in left],
                self._pad_id,
                self._ends,
                self._max_new_tokens,
                decided,
                rows_at_once=most,
                on_rows=lambda positions, into=None: assign([left[position][0] for position in positions], into),
                kind=kind,
                prefill=self._prefill,
            ):
                answers[left[position]] = answer

        with_fewer_rows(go_on, self.batch_sizes, "generate", lambda: len(pairs) - len(answers))
        return [[answers[trial, index] for index in range(len(rows))] for trial in range(trials)]

    def _passes(self, edits: Sequence[Edit | None]) -> list[Sequence[Edit | None]]:
        """The edits in groups that one pass can serve."""
        most = max(1, self.max_edits_per_pass)
        return [edits[start : start + most] for start in range(0, len(edits), most)]

    def _learn(self, phase: str, rows: TokenRows, edits: Sequence[Edit | None]) -> None:
        """Let passes of edited models over the rows of a phase know what the original model makes of them."""
        answers = phase == "generate"
        if any(edits) and self._prefill.wants(rows, answers):
            self._editor.set_edit(None)
            self._prefill.learn(rows, answers, lambda work: [None for _ in self._sorted_batches(phase, rows, work)])

    @contextmanager
    def _wearing(
        self, edits: Sequence[Edit | None], phase: str, rows: TokenRows, steady: bool = False
    ) -> Iterator[Assign]:
        """Edit the weights, or the outputs where there are several edits, while the context lasts.

        Gives the function to be told, before each forward pass over some of the ``rows`` of a phase, which of the edits
        each has. Passes that are captured need ``steady`` edits.
        """
        worn = [edit or self._applied for edit in edits]
        started = worn if any(edits) else []  # really edited weights are scored from the first block to the last
        with (
            self._edited(edits, worn, steady) as assign,
            self._prefill.of(rows, phase == "generate", started, assign) as told,
        ):
            yield told

    @contextmanager
    def _edited(self, edits: Sequence[Edit | None], worn: Sequence[Edit | None], steady: bool) -> Iterator[Assign]:
        if len(edits) == 1 or not any(edits):
            self._editor.set_edit(worn[0])
            yield lambda rows, into=None: None
            return
        if self._outputs is None:
            raise RuntimeError("several edits were asked for where outputs cannot be edited")
        self._editor.set_edit(None)
        with torch.inference_mode(), ExitStack() as stack:
            outputs, alone = self._outputs, self._retries and self._replicas.degree == 1
            prepared(lambda: stack.enter_context(outputs.active(worn, steady)), len(edits), retries=alone)
            yield self._outputs.assign

    @staticmethod
    def _pairs(rows: TokenRows, trials: int) -> list[tuple[int, int]]:
        """All (trial, index of the prompt), the longest prompts first: memory runs out at once, if ever."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        return [(trial, index) for index in order for trial in range(trials)]

    def apply(self, edit: Edit) -> None:
        self._editor.set_edit(edit)
        self._applied = edit

    def restore(self) -> None:
        self._editor.set_edit(None)
        self._applied = None

    def close(self) -> None:
        self._replays.close()
        self._prefill.close()
        del self.model, self._editor, self._outputs, self._replays, self._prefill
        self.whole = None
        release_memory()
        if self._keeps_blocks:
            return_freed_blocks(at_once=False)
            give_back_memory()

    def _residuals(self, decoder: nn.Module, rows: TokenRows) -> Tensor:
        batch = pad_left(rows, self._pad_id).to(next(decoder.parameters()).device)
        with tapped(self.model, self.anatomy) as taps:
            decoder(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.attention_mask_BS,
                position_ids=batch.position_ids_BS,
                use_cache=False,
            )
            return taps.take()

    def _first_token_logits(self, rows: TokenRows) -> Tensor:
        return self._prefill(rows).logits_BV

    def _decode(self, rows: TokenRows, max_new_tokens: int, decided: Decided | None) -> list[list[int]]:
        return decode(self.model, rows, self._pad_id, self._ends, max_new_tokens, decided)

    def _share(self, prompts: TokenRows) -> list[Sequence[int]]:
        return [prompts[index] for index in self._replicas.share(len(prompts))]

    def _sorted_batches(self, phase: str, prompts: TokenRows, work: Callable[[TokenRows], Any]) -> Any:
        """Run ``work`` on batches of prompts of like length, yielding (indices of the batch's prompts, result)."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: memory runs out at once
        in_order = [prompts[i] for i in order]
        for start, result in in_batches(in_order, self.batch_sizes, phase, work, self._cut, self._retries):
            yield order[start : start + len(result)], result

    def _cut(self, batch: TokenRows) -> int:
        """How many of the first rows of a batch, longest first, go by themselves; ranks in step have batches alike."""
        return len(batch) if self._whole_batches else first_cut([len(row) for row in batch])

    def _find_batch_size(self, phase: str, prompts: TokenRows, work: Callable[[TokenRows], Any]) -> None:
        if phase not in self.batch_sizes:
            self.batch_sizes[phase] = self._sizing.find(phase, prompts, work, self.max_edits_per_pass)
