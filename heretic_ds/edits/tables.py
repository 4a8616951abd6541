"""What edits of outputs share: of one writer over all trials of a run, and of one trial over the rows of a pass.

Mode ``full`` needs b = ŴŴᵀv of every trial. A table of ŴŴᵀ on all blocks' directions gives them all by interpolation.
Experts have a table each, [E, L, D] a block, which for large models comes to tens of GiB: where the tables of all
blocks do not fit in a budget, b is computed at the start of a pass for its own trials, [E, T, D] a block. That is work
of two tokens a trial in every expert's down projection: 0.03 s beside 2.7 s of a KL pass over 64 prompts with 4 trials,
for 39 M weights in 8 blocks of 32 experts on a CPU.

Shapes: T trials of a pass, N different directions of theirs, B rows, L blocks, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from heretic_ds.ablation import Ablation, Edit, OutputOperator, Reduce, output_operator, row_norms, row_overlaps
from heretic_ds.anatomy import Writer

_LEAST_BYTES, _SHARE_OF_WEIGHTS = 64 * 2**20, 0.05
"""Memory that tables of experts may take on a device: this, or that share of its weights if it is more."""

_Place = tuple[tuple[int, int], tuple[float, float]]
"""Two rows of a table between which a direction lies, and its shares of them."""


def table_budget(model: nn.Module, ranks: int = 1) -> int:
    """Bytes that tables of experts may take beside this process's weights: an equal part of the model's where so many
    ``ranks`` have cut it, and its parameters count as whole."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
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

    strength_T1: Tensor
    """λ."""
    unit_TD: Tensor
    """v."""
    place_T2: Tensor
    """Rows of the table between which v lies, int64."""
    share_T2: Tensor
    """With which v is the sum of the two: v = share[0] q_place[0] + share[1] q_place[1], q the table's directions."""
    overlaps_QD: Tensor | None
    """The table, ŴŴᵀq: [Q, D], or [E, Q, D]; None where no edit needs it."""

    def operator(
        self, norms_D: Tensor, trial: Tensor | slice = slice(None), expert_S: Tensor | None = None
    ) -> OutputOperator:
        """The edits of all trials [T, D], or those of slots [S, D] by trial and expert; ``norms_D`` is n of each."""
        overlaps = None
        if self.overlaps_QD is not None:
            experts = () if expert_S is None else (expert_S,)
            below, above = (self.overlaps_QD[*experts, place] for place in self.place_T2[trial].unbind(1))
            share_below, share_above = self.share_T2[trial, :, None].unbind(1)
            overlaps = torch.addcmul(below * share_below, above, share_above)
        return output_operator(norms_D, overlaps, self.unit_TD[trial], self.strength_T1[trial])

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
        directions_LD = ablation.directions_LD[1:]  # the entry 0 is used by no block
        self._basis_LD = directions_LD if self._gain_D is None else self._gain_D * directions_LD
        self.norms_D = row_norms(writer.weight_DK(model), ablation.row_norm, reduce)
        """n: [D], or [E, D] for experts."""
        self._overlaps_LD = self._overlaps(self._basis_LD) if kept and ablation.row_norm == "full" else None

    def _overlaps(self, basis_QD: Tensor) -> Tensor:
        """ŴŴᵀq for directions q: [Q, D], or [E, Q, D]."""
        basis_QD, weight_DK = basis_QD.to(self.norms_D), self._writer.weight_DK(self._model)
        if weight_DK.dim() == 2:
            return row_overlaps(weight_DK, self.norms_D, basis_QD, self._reduce)
        table_EQD = self.norms_D.new_empty(len(weight_DK), *basis_QD.shape)
        for expert, (weight, norms_D) in enumerate(zip(weight_DK, self.norms_D, strict=True)):
            table_EQD[expert] = row_overlaps(weight, norms_D, basis_QD)  # one at a time: each needs a working copy
        return table_EQD if self._reduce is None else self._reduce(table_EQD)

    def directions(self, edits: Sequence[Edit | None]) -> TrialDirections:
        """What the edits do to this writer."""
        writer, table = self._writer, self._overlaps_LD
        indices = [None if edit is None else edit.direction_index for edit in edits]
        strengths = [0.0 if edit is None else edit.strength(writer.component, writer.block) for edit in edits]
        units = [self._ablation.writer_direction(writer.block, self._gain_D, index) for index in indices]
        if table is None and self._ablation.row_norm == "full":
            table, places = self._overlaps_of_pass(units, indices)
        else:
            places = [self._place(index) for index in indices]
        numbers, dtype = partial(torch.tensor, device=self.norms_D.device), self.norms_D.dtype
        return TrialDirections(
            strength_T1=numbers(strengths, dtype=dtype)[:, None],
            unit_TD=torch.stack(units).to(self.norms_D),
            place_T2=numbers([rows for rows, _ in places]),
            share_T2=numbers([shares for _, shares in places], dtype=dtype),
            overlaps_QD=table,
        )

    def _place(self, index: float | None) -> _Place:
        """Where v lies in the table over all directions."""
        block, last = self._writer.block, len(self._basis_LD) - 1
        below = block if index is None else min(int(index), last)
        above = below if index is None else min(below + 1, last)
        fraction = 0.0 if index is None else index - int(index)
        length = torch.lerp(self._basis_LD[below], self._basis_LD[above], fraction).norm().item()
        scale = 1 / length if length > 0 else 0.0
        return (below, above), ((1 - fraction) * scale, fraction * scale)

    def _overlaps_of_pass(
        self, units: Sequence[Tensor], indices: Sequence[float | None]
    ) -> tuple[Tensor, list[_Place]]:
        """b of the trials of one pass, and where each is found: once for those that have v in common, with room for one
        each, so that tables of as many trials are alike."""
        different = list(dict.fromkeys(indices))
        table_XTD = self.norms_D.new_zeros(*self.norms_D.shape[:-1], len(units), self.norms_D.shape[-1])
        unit_ND = torch.stack([units[indices.index(index)] for index in different])
        table_XTD[..., : len(different), :] = self._overlaps(unit_ND)
        return table_XTD, [((place, place), (1.0, 0.0)) for place in map(different.index, indices)]


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
