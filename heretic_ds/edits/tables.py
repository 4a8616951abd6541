"""What edits of outputs share: of one writer over all trials of a run, and of one trial over the rows of a pass.

Mode ``full`` needs B = VŴŴᵀ of every trial. A table of ŴŴᵀ on all blocks' directions gives them all by interpolation.
Experts have a table each, [E, L·R, D] a block, which for large models comes to tens of GiB: where the tables of all
blocks do not fit in a budget, B is computed at the start of a pass for its own trials, [E, T·R, D] a block. That is
work of two tokens a direction in every expert's down projection: 0.03 s beside 2.7 s of a KL pass over 64 prompts with
4 trials of one direction, for 39 M weights in 8 blocks of 32 experts on a CPU.

Shapes: T trials of a pass, R directions of each, Q rows of a table, B rows, L blocks, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor, nn

from heretic_ds.ablation import (
    Ablation,
    Edit,
    OutputOperator,
    Reduce,
    orthonormal,
    output_operator,
    row_norms,
    row_overlaps,
    row_scales,
)
from heretic_ds.anatomy import Writer

_LEAST_BYTES, _SHARE_OF_WEIGHTS = 64 * 2**20, 0.05
"""Memory that tables of experts may take on a device: this, or that share of its weights if it is more."""

_Place = tuple[list[int], Tensor]
"""2R rows of a table between which the directions of a trial lie, and their shares [R, 2R] of them."""


def table_budget(model: nn.Module, ranks: int = 1) -> int:
    """Bytes that tables of experts may take beside this process's weights: an equal part of the model's where so many
    ``ranks`` have cut it, and its parameters count as whole."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return max(_LEAST_BYTES, int(_SHARE_OF_WEIGHTS * weights / ranks))


def bytes_of_vectors(model: nn.Module, writers: Sequence[Writer]) -> int:
    """Bytes of one number, in the dtype of tables, for each row of each of the writers' weights."""
    weights = [writer.weight_DK(model) for writer in writers]
    return sum(prod(w.shape[:-1]) * torch.promote_types(w.dtype, torch.float32).itemsize for w in weights)


def in_memory_of(old: Tensor, new: Tensor) -> Tensor:
    """New values, in the memory of old ones of the same shape."""
    return old.copy_(new) if old.shape == new.shape else new


@dataclass(frozen=True)
class TrialDirections:
    """What T edits do to one writer."""

    strength_T11: Tensor
    """λ."""
    unit_TRD: Tensor
    """V."""
    place_TM: Tensor
    """M = 2R rows of the table between which the rows of V lie, int64."""
    share_TRM: Tensor
    """With which V is a sum of them: V = share q_place, q the table's directions."""
    overlaps_QD: Tensor | None
    """The table, q ŴŴᵀ: [Q, D], or [E, Q, D]; None where no edit needs it."""

    def operator(
        self, norms_D: Tensor, trial: Tensor | slice = slice(None), expert_S: Tensor | None = None
    ) -> OutputOperator:
        """The edits of all trials [T, R, D], or those of slots [S, R, D] by trial and expert; ``norms_D`` is n of
        each."""
        overlaps_RD = None
        if self.overlaps_QD is not None:
            experts = () if expert_S is None else (expert_S,)
            places, share_RM = self.place_TM[trial].unbind(1), self.share_TRM[trial]
            rows = [self.overlaps_QD[*experts, place] for place in places]
            if share_RM.shape[1] == 1:
                below, above = share_RM.unbind(-1)
                overlaps_RD = torch.addcmul(rows[0] * below, rows[1], above).unsqueeze(1)
            else:
                overlaps_RD = share_RM @ torch.stack(rows, dim=1)
        return output_operator(norms_D, overlaps_RD, self.unit_TRD[trial], self.strength_T11[trial])

    def scales(self, norms_ED: Tensor) -> Tensor | None:
        """s [E, T, D] of every expert and trial, ``norms_ED`` their n; None where it is 1."""
        if self.overlaps_QD is None:
            return None
        experts = zip(norms_ED, self.overlaps_QD, strict=True)  # one at a time, for what it takes
        overlaps = ((norms_D, self.share_TRM @ table_QD[self.place_TM]) for norms_D, table_QD in experts)
        return torch.stack([row_scales(*expert, self.unit_TRD, self.strength_T11) for expert in overlaps])

    def replaced(self, other: TrialDirections) -> TrialDirections:
        """The values of another, in this one's memory where that is for as many trials."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return TrialDirections(*(theirs if mine is theirs else in_memory_of(mine, theirs) for mine, theirs in pairs))


class WriterTables:
    """What all edits of a run share about one writer, from its original weight."""

    def __init__(
        self, model: nn.Module, writer: Writer, ablation: Ablation, reduce: Reduce | None, kept: bool = True
    ) -> None:
        """``kept``: whether there is a table over all directions. Without, directions of trials need the weight as it
        was, and sums over ranks: every rank has to ask for those of the same edits."""
        self._model, self._writer, self._ablation, self._reduce = model, writer, ablation, reduce
        gain_D = writer.norm_gain(model) if ablation.through_norm else None
        self._gain_D = None if gain_D is None else gain_D.double().cpu()
        directions_LRD = ablation.directions_LRD[1:]  # the entry 0 is used by no block
        self._basis_LRD = directions_LRD if self._gain_D is None else self._gain_D * directions_LRD
        self.norms_D = row_norms(writer.numbers_DK(model), ablation.row_norm, reduce)
        """n: [D], or [E, D] for experts."""
        made = kept and ablation.row_norm == "full"
        self._overlaps_QD = self._overlaps(self._basis_LRD.flatten(0, 1)) if made else None

    @property
    def rank(self) -> int:
        """R."""
        return self._ablation.rank

    def _overlaps(self, basis_QD: Tensor) -> Tensor:
        """q ŴŴᵀ for directions q: [Q, D], or [E, Q, D]."""
        basis_QD, weight_DK = basis_QD.to(self.norms_D), self._writer.numbers_DK(self._model)
        if weight_DK.dim() == 2:
            return row_overlaps(weight_DK, self.norms_D, basis_QD, self._reduce)
        table_EQD = self.norms_D.new_empty(len(weight_DK), *basis_QD.shape)
        for expert, (weight, norms_D) in enumerate(zip(weight_DK, self.norms_D, strict=True)):
            table_EQD[expert] = row_overlaps(weight, norms_D, basis_QD)  # one at a time: each needs a working copy
        return table_EQD if self._reduce is None else self._reduce(table_EQD)

    def directions(self, edits: Sequence[Edit | None]) -> TrialDirections:
        """What the edits do to this writer."""
        writer, table = self._writer, self._overlaps_QD
        indices = [None if edit is None else edit.direction_index for edit in edits]
        strengths = [0.0 if edit is None else edit.strength(writer.component, writer.block) for edit in edits]
        units = [self._ablation.writer_directions(writer.block, self._gain_D, index) for index in indices]
        if table is None and self._ablation.row_norm == "full":
            table, places = self._overlaps_of_pass(units, indices)
        else:
            places = [self._place(index) for index in indices]
        return TrialDirections(
            strength_T11=torch.tensor(strengths, dtype=self.norms_D.dtype, device=self.norms_D.device)[:, None, None],
            unit_TRD=torch.stack(units).to(self.norms_D),
            place_TM=torch.tensor([rows for rows, _ in places], device=self.norms_D.device),
            share_TRM=torch.stack([share_RM for _, share_RM in places]).to(self.norms_D),
            overlaps_QD=table,
        )

    def _place(self, index: float | None) -> _Place:
        """Where V lies in the table over all directions: V = T ((1 - f) q_below + f q_above)."""
        block, last = self._writer.block, len(self._basis_LRD) - 1
        below = block if index is None else min(int(index), last)
        above = below if index is None else min(below + 1, last)
        fraction = 0.0 if index is None else index - int(index)
        made_RR, rank = self._made(below, above, fraction, index), self.rank
        rows = [first * rank + each for first in (below, above) for each in range(rank)]
        return rows, torch.cat([(1 - fraction) * made_RR, fraction * made_RR], dim=1)

    def _made(self, below: int, above: int, fraction: float, index: float | None) -> Tensor:
        """T [R, R]; of one direction 1 by the length of the mixture."""
        if self.rank > 1 and self._gain_D is None:
            return torch.eye(self.rank, dtype=torch.float64) if index is None else self._ablation.mixed(index)[1]
        mixed_RD = torch.lerp(self._basis_LRD[below], self._basis_LRD[above], fraction)
        if self.rank > 1:
            return orthonormal(mixed_RD)[1]
        length = mixed_RD.norm().item()
        return mixed_RD.new_full((1, 1), 1 / length if length > 0 else 0.0)

    def _overlaps_of_pass(
        self, units: Sequence[Tensor], indices: Sequence[float | None]
    ) -> tuple[Tensor, list[_Place]]:
        """B of the trials of one pass, and where each is found: once for those that have V in common, with room for one
        each, so that tables of as many trials are alike."""
        different, rank = list(dict.fromkeys(indices)), len(units[0])
        table_XQD = self.norms_D.new_zeros(*self.norms_D.shape[:-1], len(units) * rank, self.norms_D.shape[-1])
        unit_QD = torch.cat([units[indices.index(index)] for index in different])
        table_XQD[..., : len(unit_QD), :] = self._overlaps(unit_QD)
        itself_RM = torch.eye(rank, 2 * rank, dtype=torch.float64)
        firsts = [rank * different.index(index) for index in indices]
        return table_XQD, [([first + each % rank for each in range(2 * rank)], itself_RM) for first in firsts]


class Rows:
    """Which trial each row of the coming forward passes belongs to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._trial_B = torch.empty(0, dtype=torch.int64)

    def assign(self, trials: Sequence[int], into: Tensor | None = None) -> None:
        """Take the trial of every row, where ``into`` is given in that memory."""
        self._trial_B = torch.tensor(trials, device=self._device) if into is None else into.copy_(torch.tensor(trials))

    def of(self, count: int) -> Tensor:
        """The trial of each row, of which there have to be whole numbers of entries among ``count``."""
        rows = len(self._trial_B)
        if rows == 0 or count % rows:
            raise RuntimeError(f"{count} outputs of a writer cannot belong to {rows} rows")
        return self._trial_B

    def tokens(self, count: int) -> Tensor:
        """The trial of each of ``count`` tokens that lie flattened, row after row."""
        trial_B = self.of(count)
        return trial_B.repeat_interleave(count // len(trial_B))
