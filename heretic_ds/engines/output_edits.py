"""Edits in output space: weights stay as they are, and every row of a batch gets the edit of its own trial.

With y = Wx a writer's edit is y ↦ s∘(y - λu (w·y)) (:mod:`heretic_ds.ablation.edit`): three vectors a writer, so that
one forward pass serves many trials. What all of them share of a writer is found once: the row norms n and, where edits
keep them, ŴŴᵀ on every direction, from which any trial's b follows by interpolation.

Shapes: T trials of a pass, B rows, S positions, L blocks, D width, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.ablation import Edit, OutputOperator, Reduce, output_operator, row_norms, row_overlaps
from heretic_ds.anatomy import Anatomy, Writer, has_expert_dispatch
from heretic_ds.engines.expert_edits import ExpertEdit, dispatch_edits, edit_experts
from heretic_ds.engines.protocol import Ablation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialDirections:
    """What T edits do to the writers of one component in one block."""

    strength_T1: Tensor
    """λ."""
    unit_TD: Tensor
    """v."""
    below_T: Tensor
    """Rows of a table over directions between which v lies, int64; the entry 0, which no block uses, left out."""
    above_T: Tensor
    share_T2: Tensor
    """With which v is the sum of the two: v = share[0] q_below + share[1] q_above, q the directions of the table."""

    def mixed(self, table_LD: Tensor) -> Tensor:
        """A linear function of v [T, D], from a table [L, D] of its values on all directions."""
        share_T2 = self.share_T2.to(table_LD)
        return share_T2[:, :1] * table_LD[self.below_T] + share_T2[:, 1:] * table_LD[self.above_T]

    def copy_(self, other: TrialDirections) -> None:
        """Take the values of another, in this one's memory."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


class WriterTables:
    """What all edits of a run share about one writer, from its original weight."""

    def __init__(self, model: nn.Module, writer: Writer, ablation: Ablation, reduce: Reduce | None) -> None:
        weight_DK = writer.weight_DK(model)
        self._writer, self._ablation = writer, ablation
        gain_D = writer.norm_gain(model) if ablation.through_norm else None
        self._gain_D = None if gain_D is None else gain_D.double().cpu()
        directions_LD = ablation.directions_LD[1:]
        self._basis_LD = directions_LD if self._gain_D is None else self._gain_D * directions_LD
        self.norms_D = row_norms(weight_DK, ablation.row_norm, reduce)
        """n: [D], or [E, D] for experts."""
        self.overlaps_LD: Tensor | None = None
        """ŴŴᵀq for the directions q of all blocks: [L, D], or [E, L, D]; None where no edit needs it."""
        if ablation.row_norm == "full":
            self.overlaps_LD = self._overlaps(weight_DK, reduce)

    def _overlaps(self, weight_DK: Tensor, reduce: Reduce | None) -> Tensor:
        basis_LD = self._basis_LD.to(self.norms_D)
        if weight_DK.dim() == 2:
            return row_overlaps(weight_DK, self.norms_D, basis_LD, reduce)
        experts = zip(weight_DK, self.norms_D, strict=True)  # one at a time: each needs a working copy of its weight
        table_ELD = torch.stack([row_overlaps(expert_DK, norms_D, basis_LD) for expert_DK, norms_D in experts])
        return table_ELD if reduce is None else reduce(table_ELD)

    def directions(self, edits: Sequence[Edit | None]) -> TrialDirections | None:
        """What the edits do to this writer; None where none of them does anything."""
        strengths = self._strengths(edits)
        return self._directions(edits, strengths) if any(strengths) else None

    def all_directions(self, edits: Sequence[Edit | None]) -> TrialDirections:
        """What the edits do to this writer, be it nothing."""
        return self._directions(edits, self._strengths(edits))

    def _strengths(self, edits: Sequence[Edit | None]) -> list[float]:
        writer = self._writer
        return [0.0 if edit is None else edit.strength(writer.component, writer.block) for edit in edits]

    def _directions(self, edits: Sequence[Edit | None], strengths: Sequence[float]) -> TrialDirections:
        norms_D = self.norms_D
        parts = [self._direction(None if edit is None else edit.direction_index) for edit in edits]
        device = norms_D.device
        return TrialDirections(
            strength_T1=torch.tensor(strengths, dtype=norms_D.dtype, device=device)[:, None],
            unit_TD=torch.stack([unit_D for unit_D, _, _, _ in parts]).to(norms_D),
            below_T=torch.tensor([below for _, below, _, _ in parts], device=device),
            above_T=torch.tensor([above for _, _, above, _ in parts], device=device),
            share_T2=torch.tensor([share for _, _, _, share in parts], dtype=norms_D.dtype, device=device),
        )

    def _direction(self, index: float | None) -> tuple[Tensor, int, int, tuple[float, float]]:
        """v [D], the two rows of the table it lies between, and its shares of them."""
        block, last = self._writer.block, len(self._basis_LD) - 1
        unit_D = self._ablation.writer_direction(block, self._gain_D, index)
        below = block if index is None else min(int(index), last)
        above = below if index is None else min(below + 1, last)
        fraction = 0.0 if index is None else index - int(index)
        length = torch.lerp(self._basis_LD[below], self._basis_LD[above], fraction).norm().item()
        scale = 1 / length if length > 0 else 0.0
        return unit_D, below, above, ((1 - fraction) * scale, fraction * scale)


class Rows:
    """Which trial each row of the coming forward passes belongs to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.trial_B: Tensor | None = None
        """None: there is one trial alone."""

    def assign(self, trials: Sequence[int], single: bool, into: Tensor | None = None) -> None:
        """Take the trial of every row, where ``into`` is given in that memory."""
        if into is not None:
            self.trial_B = into.copy_(torch.tensor(trials))
        else:
            self.trial_B = None if single else torch.tensor(trials, device=self._device)

    def tokens(self, count: int) -> Tensor | None:
        """The trial of each of ``count`` tokens that lie flattened, row after row."""
        if self.trial_B is None:
            return None
        self.check(count)
        return self.trial_B.repeat_interleave(count // len(self.trial_B))

    def check(self, count: int) -> None:
        """Refuse a first dimension that is no whole number of entries a row."""
        if self.trial_B is not None and count % len(self.trial_B):
            raise RuntimeError(f"{count} outputs of a writer cannot belong to {len(self.trial_B)} rows")


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
        overlaps_TD = None if tables.overlaps_LD is None else directions.mixed(tables.overlaps_LD)
        return output_operator(norms_D, overlaps_TD, directions.unit_TD, directions.strength_T1)

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
        self, model: PreTrainedModel, anatomy: Anatomy, ablation: Ablation, reduce: Reduce | None = None
    ) -> None:
        """``reduce`` adds up a tensor over the ranks between which every writer's inputs are split; None: all here."""
        self._model, self._anatomy, self._ablation, self._reduce = model, anatomy, ablation, reduce
        self._tables: dict[str, WriterTables] = {}
        self._rows = Rows(next(model.parameters()).device)
        self._count = 0
        self._steady: dict[str, DenseEdit | ExpertEdit] = {}
        self._capacity = 0
        self._moves = 0
        self.kind = 0
        """Of the forward passes: 0 without steady edits, else a number that grows when these get other memory."""
        per_expert = [w for w in anatomy.writers if self._edits_experts(w)]
        if per_expert:
            dispatch_edits(model, [writer.module for writer in per_expert])

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

    def _tables_of(self, writer: Writer) -> WriterTables:
        if writer.weight not in self._tables:
            self._tables[writer.weight] = WriterTables(self._model, writer, self._ablation, self._reduce)
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
