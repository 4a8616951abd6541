"""What edits of outputs share: of one writer over all trials of a run, and of one trial over the rows of a pass.

Shapes: T trials of a pass, B rows, L blocks, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from heretic_ds.ablation import Ablation, Edit, Reduce, row_norms, row_overlaps
from heretic_ds.anatomy import Writer


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
