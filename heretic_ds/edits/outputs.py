"""Edits in output space: weights stay as they are, and every row of a batch gets the edit of its own trial.

With y = Wx a writer's edit is y ↦ s∘(y - λu (w·y)) (:mod:`heretic_ds.ablation.edit`): three vectors a writer, so that
one forward pass serves many trials. What all of them share of a writer is found once: the row norms n and, where edits
keep them and memory allows, ŴŴᵀ on every direction, from which any trial's b follows by interpolation.

Shapes: T trials of a pass, B rows, S positions, L blocks, D width, E experts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.ablation import Ablation, Edit, OutputOperator, Reduce, output_operator
from heretic_ds.anatomy import Anatomy, Writer, has_expert_dispatch
from heretic_ds.edits.experts import ExpertEdit, dispatch_edits, edit_experts
from heretic_ds.edits.tables import Rows, TrialDirections, WriterTables, bytes_of_vectors, table_budget

log = logging.getLogger(__name__)


class DenseEdit:
    """The edits of one pass to the outputs of one module."""

    def __init__(
        self, tables: WriterTables, directions: TrialDirections, bias_D: Tensor | None, rows: Rows, experts: bool
    ) -> None:
        self._tables, self._experts = tables, experts
        self._operator = self._operator_of(directions)
        self._bias_D, self._rows = bias_D, rows

    def _operator_of(self, directions: TrialDirections) -> OutputOperator:
        tables = self._tables
        norms_D = tables.norms_D[0] if self._experts else tables.norms_D  # experts alike: all have n = 1
        return output_operator(norms_D, directions.mixed(), directions.unit_TD, directions.strength_T1)

    def retake(self, directions: TrialDirections) -> None:
        """Become the edits of as many other trials, in the memory of these."""
        self._fields_TFD.copy_(_side_by_side(self._operator_of(directions)))

    @cached_property
    def _fields_TFD(self) -> Tensor:
        """The operator's vectors side by side, so that one look-up gives those of a row."""
        return _side_by_side(self._operator)

    def _of_rows(self, trial_B: Tensor | None) -> OutputOperator:
        """The operator with fields [B, 1, D], or [1, D] for one trial."""
        if trial_B is None:
            return self._operator
        step_B1D, probe_B1D, *scale = self._fields_TFD.index_select(0, trial_B).unsqueeze(2).unbind(1)
        return OutputOperator(step_B1D, probe_B1D, scale[0] if scale else None)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A forward hook. Outputs are [B, S, D], or flattened [B·S, D]."""
        trial_B = self._rows.trial_B
        self._rows.check(output.shape[0])
        value = output if trial_B is None else output.reshape(len(trial_B), -1, output.shape[-1])
        value = value.to(self._operator.step_D.dtype)
        if self._bias_D is not None:
            value = value - self._bias_D
        value = _applied(self._of_rows(trial_B), value)
        if self._bias_D is not None:
            value += self._bias_D
        return value.reshape(output.shape).to(output.dtype)


def _side_by_side(operator: OutputOperator) -> Tensor:
    vectors = [operator.step_D, operator.probe_D] + ([] if operator.scale_D is None else [operator.scale_D])
    return torch.stack([vector.expand_as(operator.step_D) for vector in vectors], dim=1)


def _applied(operator: OutputOperator, value: Tensor) -> Tensor:
    """What calling the operator does, in fewer passes over memory; the value has its dtype."""
    along = value @ operator.probe_D.transpose(-1, -2)
    edited = torch.addcmul(value, operator.step_D, along, value=-1)
    return edited if operator.scale_D is None else edited.mul_(operator.scale_D)


class OutputEdits:
    """Edits of one model's outputs, for one set of directions. The weights must be the original ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        ablation: Ablation,
        reduce: Reduce | None = None,
        budget: int | None = None,
    ) -> None:
        """``reduce`` adds up a tensor over the ranks between which every writer's inputs are split; None: all here.

        ``budget``: bytes that tables of experts may take, :func:`table_budget` by default. Ranks of a replica have to
        be given the same: it decides what they compute together, and when.
        """
        self._model, self._anatomy, self._ablation, self._reduce = model, anatomy, ablation, reduce
        self._tables: dict[str, WriterTables] = {}
        self._rows = Rows(next(model.parameters()).device)
        self._count = 0
        self._steady: dict[str, DenseEdit | ExpertEdit] = {}
        self._capacity = 0
        self._moves = 0
        self.kind = 0
        """Of the forward passes: 0 without steady edits, else a number that grows when these get other memory."""
        self.most_edits = sys.maxsize
        """Edits of one pass at most, for their tables to stay within the budget; 1 where not even two fit."""
        self._keeps_tables = True
        per_expert = [w for w in anatomy.writers if self._edits_experts(w)]
        self._plan_tables(per_expert, budget)
        if per_expert:
            dispatch_edits(model, [writer.module for writer in per_expert])

    def _plan_tables(self, per_expert: Sequence[Writer], budget: int | None) -> None:
        """Whether experts have tables over all directions, or else how many edits a pass may have; by shapes alone."""
        each = bytes_of_vectors(self._model, per_expert)  # of a direction, and of the row norms
        whole = (self._anatomy.n_blocks + 1) * each
        budget = table_budget(self._model) if budget is None else budget
        if self._ablation.row_norm == "full" and whole > budget:
            self._keeps_tables, self.most_edits = False, max(1, budget // each - 1)
            log.info(
                "tables of experts would take %.1f GiB: each pass computes what its own edits need, of up to %d trials",
                whole / 2**30,
                self.most_edits,
            )

    def _edits_experts(self, writer: Writer) -> bool:
        """Whether a writer's experts differ in their edits, so that the sum of their outputs is too late for it."""
        return writer.experts is not None and (self._ablation.row_norm != "none" or writer.bias is not None)

    @contextmanager
    def active(self, edits: Sequence[Edit | None], steady: bool = False) -> Iterator[None]:
        """While the context lasts, forward passes are those of the edits; None leaves a row as it is.

        Before each pass :meth:`assign` has to name the edit of every row. ``steady`` edits, at least two, all do the
        same work in the same memory, those of one context and those of the next: as long as :attr:`kind` is the same,
        a pass that was captured during one is right during another.
        """
        self._count = len(edits)
        with ExitStack() as stack:
            for writer, edit in self._steady_edits(edits) if steady else self._edits(edits):
                stack.enter_context(self._editing(writer, edit))
            self.kind = self._moves if steady else 0
            try:
                yield
            finally:
                self.kind = 0

    def _edits(self, edits: Sequence[Edit | None]) -> Iterator[tuple[Writer, DenseEdit | ExpertEdit]]:
        """Edits of the writers to which any is done."""
        for writer in self._anatomy.writers:
            directions = self._tables_of(writer).directions(edits)
            if directions is not None:
                yield writer, self._edit(writer, directions)

    def _steady_edits(self, edits: Sequence[Edit | None]) -> Iterator[tuple[Writer, DenseEdit | ExpertEdit]]:
        """Edits of all writers, of always as many trials."""
        if len(edits) > self._capacity:
            self._steady, self._capacity, self._moves = {}, len(edits), self._moves + 1
        edits = [*edits, *[None] * (self._capacity - len(edits))]
        for writer in self._anatomy.writers:
            directions = self._tables_of(writer).all_directions(edits)
            if writer.weight not in self._steady:
                self._steady[writer.weight] = self._edit(writer, directions)
            self._steady[writer.weight].retake(directions)
            yield writer, self._steady[writer.weight]

    def assign(self, trials: Sequence[int], into: Tensor | None = None) -> None:
        """For each row of the coming forward passes the position of its edit among the active ones.

        Captured passes read it ``into`` memory that stays where it is.
        """
        self._rows.assign(trials, self._count == 1, into)

    def forget(self) -> None:
        """Drop what is kept between passes; ranks that make it together have to drop it together."""
        self._tables.clear()

    def _tables_of(self, writer: Writer) -> WriterTables:
        if writer.weight not in self._tables:
            kept = self._keeps_tables or writer.experts is None
            self._tables[writer.weight] = WriterTables(self._model, writer, self._ablation, self._reduce, kept)
        return self._tables[writer.weight]

    def _edit(self, writer: Writer, directions: TrialDirections) -> DenseEdit | ExpertEdit:
        tables = self._tables_of(writer)
        bias_D = None if writer.bias is None else self._model.get_parameter(writer.bias).detach()
        if self._edits_experts(writer):
            return ExpertEdit(tables, directions, bias_D, self._rows)
        return DenseEdit(tables, directions, bias_D, self._rows, writer.experts is not None)

    @contextmanager
    def _editing(self, writer: Writer, edit: DenseEdit | ExpertEdit) -> Iterator[None]:
        module = self._model.get_submodule(writer.module)
        if isinstance(edit, ExpertEdit):
            with edit_experts(module, edit):
                yield
            return
        handle = module.register_forward_hook(edit)
        try:
            yield
        finally:
            handle.remove()


def obstacle(model: nn.Module, anatomy: Anatomy) -> str | None:
    """Why rows of one batch cannot have edits of their own in this model; None where they can."""
    for writer in anatomy.writers:
        if "*" in writer.path.split("."):
            return f"{writer.path} gets tokens of many prompts without their order"
        if writer.experts is not None and not has_expert_dispatch(model.get_submodule(writer.module)):
            return f"{writer.path} does not look up its computation in transformers' registry"
    return None
