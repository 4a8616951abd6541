"""A model that runs through forward passes of this process, however its weights lie: it captures, scores and answers.

Placements build it: they lay the weights out, say how a writer's weight is edited there (the editor), which ranks a
pass needs (the comm), and what else is true of their model (the traits).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from heretic_ds import progress
from heretic_ds.ablation import Ablation, Edit, ResidualMeans, winsorize
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.edits.outputs import OutputEdits
from heretic_ds.edits.packed import editor_of
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.memory import give_back_memory, keep_freed_blocks, release_memory, return_freed_blocks
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.comm import ALONE, Comm
from heretic_ds.runner.decode import Decoder, end_tokens, shrinking
from heretic_ds.runner.rows import Row, Stop, answering, first_cut, rows_of
from heretic_ds.runner.sizing import FITTING_TOKENS, PROBE_TOKENS, Batches
from heretic_ds.runner.taps import TakeResiduals, tapped, to_rank_0
from heretic_ds.runner.traits import RunnerOptions, Traits
from heretic_ds.scoring.base import Decided, ReadLogits

__all__ = ["MOST_EDITS", "Runner", "RunnerOptions", "Traits"]

log = logging.getLogger(__name__)

MOST_EDITS = 64
"""Most edits of one pass where outputs are edited."""


class Runner:
    """Edits are made in the weights themselves one at a time, or in outputs many at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        tokenizer: Any,
        options: RunnerOptions,
        comm: Comm = ALONE,
        traits: Traits | None = None,
        editor: WeightEditor | None = None,
    ) -> None:
        """By default the model lies whole in this process, without partners."""
        self.model, self.anatomy, self.traits = model, anatomy, (traits := traits or Traits(graphs=True))
        self.whole: LoadedModel | None = None
        """The model where it lies whole in this process, so that it can be written or talked to; else None."""
        self._comm, self._options = comm, options
        self._ends = end_tokens(model, tokenizer)
        self._editor = editor or editor_of(model, anatomy)
        self._outputs: OutputEdits | None = None
        edits = traits.edits
        found = "this placement edits weights alone" if edits is None else edits.obstacle(model, anatomy)
        self._obstacle = next(filter(None, comm.world.gather(found)), None)  # ranks may hold different writers
        self.max_edits_per_pass = MOST_EDITS if self._obstacle is None else 1
        self._applied: Edit | None = None
        reuse = options.prefill_reuse and traits.rows_move
        self._forward = traits.forward(model, anatomy, tokenizer.pad_token_id, reuse, comm)
        in_slots = traits.rows_move and traits.slots
        self._decoder = Decoder(self._forward, anatomy, in_slots, options.cuda_graphs and traits.graphs)
        self._batches = Batches(comm, self._device, traits.name, options.max_new_tokens, traits.retries)
        self._batches.evictable += [self._forward, self._decoder]
        self._batches.measured.starts_late = self._forward.wanted
        if options.batch_size:
            self.batch_sizes.update(dict.fromkeys(("capture", "kl", "generate"), options.batch_size))
        self._keeps_blocks = traits.rows_move and self._device.type == "cpu"
        if self._keeps_blocks:
            keep_freed_blocks()

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Rows per batch by phase (``capture``, ``kl``, ``generate``), as set, measured or halved."""
        return self._batches.sizes

    @property
    def batch_bytes(self) -> dict[str, int]:
        """By phase, where a batch size was measured here: what such batches take beside the weights; 0: not asked."""
        return self._batches.measured.bytes

    @property
    def degree(self) -> int:
        """Ranks that hold one replica of the model together."""
        return self._comm.degree

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as loaded, those that are packed in few bits left out."""
        return next(weight.dtype for weight in self.model.parameters() if weight.is_floating_point())

    @torch.inference_mode()
    def capture(self, prompts: TokenRows, winsorize_quantile: float = 1.0) -> Tensor:
        """Mean residuals [L+1, D], float64, at the last position of each prompt."""
        rows, own, means = self._own_rows(prompts), self._comm.shares.own(len(prompts)), ResidualMeans()
        with progress.work("residuals", len(rows), "prompts") as work:
            for batch, residual_BLD in self._batches.over(rows, "capture", self._residuals, self._cut):
                counted = [place for place, row in enumerate(batch) if row.index < own]
                kept_BLD = residual_BLD[counted].float()
                means.update(winsorize(kept_BLD, winsorize_quantile) if counted else kept_BLD)
                work.advance(len(batch))
        return self._forward.joined(means.mean(self._comm.shares.total))

    @torch.inference_mode()
    def residuals(self, prompts: TokenRows, take: TakeResiduals, winsorize_quantile: float = 1.0) -> None:
        """Hand the residuals of every prompt at its last position to ``take``, on rank 0, as they come."""
        self._batches.measured.find(self._own_rows(prompts), "capture", self._residuals)
        passes = partial(self._batches.over, phase="capture", work=self._residuals, cut=self._cut)
        to_rank_0(prompts, self.anatomy, self._comm.shares, passes, self._forward.joined, take, winsorize_quantile)

    def prepare(self, ablation: Ablation) -> None:
        """Take the directions that every later edit refers to."""
        self._applied = None
        self._decoder.forget()
        self._editor.prepare(ablation)
        kind = self.traits.edits
        if kind is not None and self._obstacle is None:
            budget = int(self._comm.least(kind.budget(self.model)))  # alike on all ranks, which make tables together
            self._outputs = outputs = kind(self.model, self.anatomy, ablation, self._editor.reduce, budget)
            self.max_edits_per_pass = int(self._comm.least(min(MOST_EDITS, outputs.most_edits)))
        elif kind is not None:
            log.info("every trial has passes of its own: %s", self._obstacle)

    @torch.inference_mode()
    def distributions(
        self,
        prompts: TokenRows,
        edits: Sequence[Edit | None],
        read: ReadLogits,
        continuations: TokenRows | None = None,
    ) -> list[list[float]]:
        """What ``read`` makes of the next-token logits of each prompt under each edit: ``[edit][prompt]``.

        After the prompt alone, or with ``continuations``, one for each prompt, also after each of its tokens. An edit
        of None stands for the weights as they are; they are left as they were found, as far as a caller can tell.
        """
        given = continuations or [()] * len(prompts)
        wholes = [[*prompt, *more] for prompt, more in zip(prompts, given, strict=True)]
        result, share, last = [], self._comm.shares.share(len(prompts)), 1 + max(map(len, given), default=0)

        def work(batch: Sequence[Row]) -> list[float]:
            found: list[float] = []
            for part in self._forward.parts(batch):
                logits = self._forward(part, last=last).logits_BV
                if not self._forward.knows_logits:
                    found += [0.0] * len(part)
                    continue
                at = [share[row.index] for row in part]
                # From the end, for a batch of short rows has fewer positions than were asked for.
                found += read(at, [each[-1 - len(given[index]) :] for index, each in zip(at, logits, strict=True)])
            return found

        def sample(batch: Sequence[Row]) -> None:
            for part in self._forward.parts(batch):
                self._forward(part, last=last)

        own = [wholes[index] for index in share]
        if "kl" not in self.batch_sizes:
            self._editor.set_edit(self._applied)
            most = self.max_edits_per_pass
            self._batches.measured.find(rows_of(own), "kl", sample, most, "capture")
        for together in self._passes(edits):
            self._learn("kl", own, together)
            rows = rows_of(own, len(together))
            values = torch.zeros(len(together), len(own), dtype=torch.float64)
            with self._edited(together, "kl", own), progress.work("distributions", len(rows), "prompts") as passed:
                for batch, found in self._batches.over(rows, "kl", work, self._cut):
                    for row, value in zip(batch, found, strict=True):
                        values[row.trial, row.index] = value
                    passed.advance(len(batch))
            values = self._forward.told(values)
            result += [self._comm.shares.gather(each, len(prompts)) for each in values.tolist()]
        return result

    def generate(
        self, prompts: TokenRows, edits: Sequence[Edit | None], decided: Decided | None = None, at_once: int = 0
    ) -> list[list[list[int]]]:
        """Greedy answers as token ids, without the end token: ``[edit][prompt][token]``.

        With ``at_once``, so many rows are in a batch where its size was not measured yet, which this then leaves open.
        """
        if at_once and "generate" not in self.batch_sizes:
            with self._batches.for_now("generate", at_once):
                return self.generate(prompts, edits, decided)
        own, result = [prompts[index] for index in self._comm.shares.share(len(prompts))], []
        stop = Stop(self._ends, self._options.max_new_tokens, decided)
        if "generate" not in self.batch_sizes or not self._decoder.settled:  # else edited weights may stay for a while
            self._editor.set_edit(self._applied)
            self._settle(own)
        for together in self._passes(edits):
            self._learn("generate", own, together)
            rows = rows_of(own, len(together))
            with self._edited(together, "generate", own), answering(rows, stop.limit):
                if self._decoder.moves_rows:
                    self._batches.finish(rows, "generate", lambda most: self._answer(rows, stop, most))  # noqa: B023
                else:
                    for _ in self._batches.over(rows, "generate", lambda batch: self._answer(batch, stop), self._cut):
                        pass
            answers: list[list[list[int]]] = [[[] for _ in own] for _ in together]
            for row in rows:
                answers[row.trial][row.index] = row.answer
            result += [self._comm.shares.gather(each, len(prompts)) for each in answers]
        return result

    def _settle(self, prompts: TokenRows) -> None:
        """Find out how answers are decoded, and in batches of how many rows."""
        if not self._comm.attempt(self._decoder.settle)[0]:
            self._decoder.without_slots("memory ran out in a trial step")
        elif self._comm.any_partner(not self._decoder.moves_rows) and self._decoder.moves_rows:
            self._decoder.without_slots("a trial step gave other logits on another rank")
        timed, fitted = Stop(self._ends, PROBE_TOKENS), Stop((), FITTING_TOKENS)
        self._batches.measured.find(
            rows_of(prompts),
            "generate",
            lambda rows: self._answer(rows, timed),
            self.max_edits_per_pass,
            "capture",
            fitting=lambda rows: self._answer(rows, fitted),
        )

    def _answer(self, rows: Sequence[Row], stop: Stop, most: int | None = None) -> None:
        """Decode until all rows are done, at most so many at a time where rows move; all of a sample at once."""
        with self.traits.decoding(stop.limit):
            if self._decoder.moves_rows:
                buffers = None if most is None else 0 if self._outputs is None else self._outputs.buffers
                for _ in self._decoder.answers(rows, stop, most or len(rows), buffers):
                    pass
            else:
                for row in rows:
                    row.begin()
                shrinking(self._forward, rows, stop, self._comm.anyone)

    def _passes(self, edits: Sequence[Edit | None]) -> list[Sequence[Edit | None]]:
        """The edits in groups that one pass can serve."""
        most = max(1, self.max_edits_per_pass)
        return [edits[start : start + most] for start in range(0, len(edits), most)]

    def _learn(self, phase: str, prompts: TokenRows, edits: Sequence[Edit | None]) -> None:
        """Let passes of edited models over the prompts of a phase know what the original model makes of them."""
        answers = phase == "generate"
        if any(edits) and self._forward.wants(prompts, answers):
            self._editor.set_edit(None)

            def over(work: Callable[[Sequence[Row]], object]) -> None:
                for _ in self._batches.over(rows_of(prompts), phase, work, self._cut, "learned"):
                    pass

            self._forward.learn(prompts, answers, over)

    @contextmanager
    def _edited(self, edits: Sequence[Edit | None], phase: str, prompts: TokenRows) -> Iterator[None]:
        """Edit the weights, or the outputs where there are several edits, while the context lasts; passes over the
        prompts of the phase, if they were learned, begin where the edits do."""
        worn = [edit or self._applied for edit in edits]
        started = worn if any(edits) else []  # really edited weights are scored from the first block to the last
        with self._forward.using(prompts, phase == "generate", started):
            if len(edits) == 1 or not any(edits):
                self._editor.set_edit(worn[0])
                yield
                return
            if self._outputs is None:
                raise RuntimeError("several edits were asked for where outputs cannot be edited")
            self._editor.set_edit(None)
            static = phase == "generate" and self._decoder.captures
            with torch.inference_mode(), ExitStack() as stack:
                outputs = self._outputs

                def undo() -> None:
                    stack.close()
                    outputs.forget()

                self._batches.make_ready(lambda: stack.enter_context(outputs.active(worn, static)), undo, len(edits))
                self._forward.edits = self._outputs
                try:
                    yield
                finally:
                    self._forward.edits = None

    def apply(self, edit: Edit) -> None:
        """Edit the weights themselves, until :meth:`restore`."""
        self._editor.set_edit(edit)
        self._applied = edit

    def restore(self) -> None:
        """Bring every weight back, bit for bit."""
        self._editor.set_edit(None)
        self._applied = None

    def close(self) -> None:
        """Release the model's memory; the runner is of no use afterwards."""
        self._decoder.rest()
        self._forward.close()
        del self.model, self._editor, self._outputs, self._decoder, self._forward, self._batches.evictable
        self.whole = None
        self.traits.close()
        release_memory()
        if self._keeps_blocks:
            return_freed_blocks(at_once=False)
            give_back_memory()

    def _residuals(self, rows: Sequence[Row]) -> Tensor:
        """Residuals [B, L+1, D] at the last position of each row."""
        found = []
        with tapped(self.model, self.anatomy) as taps:
            for part in self._forward.parts(rows):
                self._forward(part)
                found.append(taps.take())
        return torch.cat(found) if len(found) > 1 else found[0]

    def _own_rows(self, prompts: TokenRows) -> list[Row]:
        return rows_of([prompts[index] for index in self._comm.shares.share(len(prompts))])

    def _cut(self, lengths: list[int]) -> int:
        """How many of the first rows of a batch, longest first, go by themselves; partners have batches alike."""
        return first_cut(lengths) if self.traits.rows_move else len(lengths)
