"""Edits in output space: weights stay as they are, and every row of a batch gets the edit of its own trial.

With y = Wx a writer's edit is y ↦ s∘(y - λU (Py)) (:mod:`heretic_ds.ablation.edit`): 2R + 1 vectors a writer for R
directions, so that one forward pass serves many trials. What all of them share of a writer is found once: the row norms
n and, where edits keep them and memory allows, ŴŴᵀ on every direction, from which any trial's B follows by
interpolation.

Shapes: T trials of a pass, B rows, S positions, D width, E experts, R directions of an edit, F fields of an operator.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.ablation import Ablation, Edit, Reduce
from heretic_ds.anatomy import Anatomy, Writer, has_expert_dispatch
from heretic_ds.edits.experts import ExpertEdit, edit_experts
from heretic_ds.edits.tables import Rows, WriterTables, bytes_of_vectors, in_memory_of, table_budget

log = logging.getLogger(__name__)

_LEAST_BESIDE = 8
"""Edits along several directions for which there has to be room beside tables, or these are not worth keeping."""


class DenseEdit:
    """The edits of one pass to the outputs of one module."""

    def __init__(self, tables: WriterTables, bias_D: Tensor | None, edits: Sequence[Edit | None], rows: Rows) -> None:
        self._tables, self._bias_D, self._rows = tables, bias_D, rows
        self._fields_TFD = self._fields(edits)
        """The operators' vectors side by side, so that one look-up gives those of a row."""

    def set(self, edits: Sequence[Edit | None]) -> None:
        """Become other edits, in the memory of those before where these are as many."""
        self._fields_TFD = in_memory_of(self._fields_TFD, self._fields(edits))

    def _fields(self, edits: Sequence[Edit | None]) -> Tensor:
        norms_D = self._tables.norms_D
        norms_D = norms_D if norms_D.dim() == 1 else norms_D[0]  # experts alike: all have n = 1
        operator = self._tables.directions(edits).operator(norms_D)
        fields = [operator.step_RD, operator.probe_RD]
        if operator.scale_D is not None:
            fields.append(operator.scale_D.unsqueeze(1))
        return torch.cat([each.expand(len(edits), -1, -1) for each in fields], dim=1)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A forward hook: what calling the operator does, in fewer passes over memory. Outputs are [B, S, D], or
        flattened [B·S, D]."""
        trial_B = self._rows.of(len(output))
        value = output.reshape(len(trial_B), -1, output.shape[-1]).to(self._fields_TFD.dtype)
        if self._bias_D is not None:
            value = value - self._bias_D
        rank = self._tables.rank
        step_BRD, probe_BRD, *scale = self._fields_TFD.index_select(0, trial_B).split(rank, dim=1)
        found_BSR = value @ probe_BRD.transpose(-1, -2)
        if rank == 1:
            value = torch.addcmul(value, step_BRD, found_BSR, value=-1)
        else:
            value = torch.baddbmm(value, found_BSR, step_BRD, alpha=-1)
        if scale:
            value *= scale[0]
        if self._bias_D is not None:
            value += self._bias_D
        return value.reshape(output.shape).to(output.dtype)


class OutputEdits:
    """Edits of one model's outputs, for one set of directions. The weights must be the original ones.

    What edits need lies in memory that the next pass's edits are written into.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        ablation: Ablation,
        reduce: Reduce | None = None,
        budget: int | None = None,
    ) -> None:
        """``reduce`` adds up a tensor over the ranks between which every writer's inputs are split; None: all here.

        ``budget``: bytes that tables of experts may take, :meth:`budget` by default. Ranks of a replica have to be
        given the same: it decides, with shapes alone, what they compute together, and when.
        """
        self._model, self._anatomy, self._ablation, self._reduce = model, anatomy, ablation, reduce
        self._rows = Rows(next(model.parameters()).device)
        self._edits: dict[str, DenseEdit | ExpertEdit] = {}
        self._room = 0
        """Trials that edits get memory for."""
        self.buffers = 0
        """0 unless passes read static edits; else how many trials these have memory for: it grows when that moves."""
        experts = [w for w in anatomy.writers if self._edits_experts(w)] if ablation.row_norm == "full" else []
        each = bytes_of_vectors(model, experts)  # of a direction, and of the row norms
        budget = self.budget(model) if budget is None else budget
        self._keeps_tables, self.most_edits = _tables_and_edits(anatomy.n_blocks, ablation.rank, each, budget)
        """Edits of one pass at most, for what they need to stay within the budget; 1 where not even two fit."""
        if not self._keeps_tables:
            whole = (anatomy.n_blocks * ablation.rank + 1) * each
            told = "tables of experts would take %.1f GiB: each pass computes what its edits need, of up to %d trials"
            log.info(told, whole / 2**30, self.most_edits)

    @classmethod
    def budget(cls, model: nn.Module) -> int:
        """Bytes that tables of experts may take on this rank."""
        return table_budget(model)

    @classmethod
    def obstacle(cls, model: nn.Module, anatomy: Anatomy) -> str | None:
        """Why rows of one batch cannot have edits of their own in this model; None where they can."""
        for writer in anatomy.writers:
            if "*" in writer.path.split("."):
                return f"{writer.path} gets tokens of many prompts without their order"
            if writer.experts is not None and not has_expert_dispatch(model.get_submodule(writer.module)):
                return f"{writer.path} does not look up its computation in transformers' registry"
        return None

    @contextmanager
    def active(self, edits: Sequence[Edit | None], static: bool = False) -> Iterator[None]:
        """While the context lasts, forward passes are those of the edits; None leaves a row as it is.

        Before each pass :meth:`assign` has to name the edit of every row. ``static`` edits all do the same work in the
        same memory, those of one context and those of the next: as long as :attr:`buffers` is the same, a pass that was
        captured during one is right during another.
        """
        self._room = max(self._room, len(edits))
        filled = [*edits, *[edits[-1]] * (self._room - len(edits))]
        with ExitStack() as stack:
            for writer in self._anatomy.writers:
                if static or any(edit.strength(writer.component, writer.block) for edit in edits if edit is not None):
                    self._attach(writer, self._set(writer, filled), stack)
            self.buffers = self._room if static else 0
            try:
                yield
            finally:
                self.buffers = 0

    def assign(self, trials: Sequence[int], into: Tensor | None = None) -> None:
        """For each row of the coming forward passes the position of its edit among the active ones.

        Captured passes read it ``into`` memory that stays where it is.
        """
        self._rows.assign(trials, into)

    def forget(self) -> None:
        """Drop what is kept between passes; ranks that make it together have to drop it together."""
        self._edits.clear()

    def _edits_experts(self, writer: Writer) -> bool:
        """Whether a writer's experts differ in their edits, so that the sum of their outputs is too late for it."""
        return writer.experts is not None and (self._ablation.row_norm != "none" or writer.bias is not None)

    def _set(self, writer: Writer, edits: Sequence[Edit | None]) -> DenseEdit | ExpertEdit:
        """The edits of a writer's outputs."""
        if (known := self._edits.get(writer.weight)) is not None:
            known.set(edits)
            return known
        kept = self._keeps_tables or writer.experts is None
        tables = WriterTables(self._model, writer, self._ablation, self._reduce, kept)
        bias_D = None if writer.bias is None else self._model.get_parameter(writer.bias).detach()
        by_slot = self._edits_experts(writer)
        new = ExpertEdit(tables, bias_D, edits) if by_slot else DenseEdit(tables, bias_D, edits, self._rows)
        self._edits[writer.weight] = new
        return new

    def _attach(self, writer: Writer, edit: DenseEdit | ExpertEdit, stack: ExitStack) -> None:
        """Let a writer's outputs be edited until ``stack`` is left."""
        if isinstance(edit, DenseEdit):
            stack.callback(self._model.get_submodule(writer.module).register_forward_hook(edit).remove)
            return

        def by_slot(output_SD: Tensor, expert_S: Tensor) -> Tensor:
            return edit(output_SD, expert_S, self._rows.tokens(len(expert_S)))

        stack.callback(edit_experts(self._model, writer.module, by_slot))


def _tables_and_edits(blocks: int, rank: int, each: int, budget: int) -> tuple[bool, int]:
    """Whether tables over all directions are kept, and how many edits a pass may have, for experts whose every
    direction takes ``each`` bytes. Edits along several directions keep s beside, as much as one direction."""
    if each == 0:
        return True, sys.maxsize
    vectors = budget // each
    beside = vectors - (blocks * rank + 1)
    if beside >= (0 if rank == 1 else _LEAST_BESIDE):
        return True, sys.maxsize if rank == 1 else beside
    return False, max(1, (vectors - 1) // (1 if rank == 1 else rank + 1))
