"""Edits as low-rank additions to a weight: what an adapter can hold.

Shapes: D width of the stream (a writer's output), K a writer's input, R rank. With W' the edited weight, and the names
of :mod:`heretic_ds.ablation.edit`,

    ΔW = W' - W = diag(s - 1) W - λ diag(s) N Vᵀ (V Ŵ).

In the row-norm modes ``none`` and ``pre`` s = 1, and ΔW is a product whose rank is the number of directions: nothing is
left out. In mode ``full`` the first term has full rank, and is small: s_i - 1 is of the order of λ/D for each direction
where rows are unlike each other. There the truncated singular value decomposition gives the nearest matrix of rank R
(Eckart and Young 1936): with Q the first R left singular vectors of ΔW,

    B = Q,   A = Qᵀ ΔW,   ‖ΔW - BA‖² = ‖ΔW‖² - ‖A‖²  (Frobenius).

A norm behind the writer changes nothing of this: it acts on Wx + BAx as on W'x. Which direction is removed does depend
on it (:meth:`heretic_ds.ablation.Ablation.writer_direction`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heretic_ds.ablation.edit import edit_weight, exact_factors

_EXACT_BELOW = 1024
"""Matrices whose smaller side is at most this are decomposed exactly; of larger ones a subspace is iterated."""
_SPARE, _ROUNDS = 16, 4
"""Vectors beyond the rank, and rounds, of that iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)."""


@dataclass(frozen=True)
class LowRank:
    """ΔW, or what of it a rank allows, as a product of two thin matrices."""

    out_DR: Tensor
    """B."""
    in_RK: Tensor
    """A."""
    left_out: float
    """‖ΔW - BA‖² (Frobenius, squared); 0 where the product is exact."""
    change: float
    """‖ΔW‖²."""

    @property
    def rank(self) -> int:
        """R."""
        return self.in_RK.shape[0]


@torch.no_grad()
def low_rank_edit(weight_DK: Tensor, direction_RD: Tensor, strength: float, row_norm: str, rank: int) -> LowRank:
    """What an edit adds to one writer's weight, in at least float32: of as many ranks as directions in the modes
    ``none`` and ``pre``, whatever ``rank`` says; in mode ``full`` the nearest of that ``rank``, or of the matrix's own
    where that is lower.

    Arguments as for :func:`heretic_ds.ablation.edit_weight`; the weight is one matrix.
    """
    if row_norm != "full":
        step_DR, overlap_RK = exact_factors(weight_DK, direction_RD, strength, row_norm)
        steps_RR, overlaps_RR = (each @ each.T for each in (step_DR.T.double(), overlap_RK.double()))
        return LowRank(step_DR, overlap_RK, 0.0, (steps_RR * overlaps_RR).sum().item())
    weight_DK = weight_DK.double()
    change_DK = edit_weight(weight_DK, direction_RD, strength, row_norm) - weight_DK
    out_DR = _leading_vectors(change_DK, rank)
    in_RK = out_DR.T @ change_DK
    change = change_DK.square().sum().item()
    left_out = max(0.0, change - in_RK.square().sum().item())
    return LowRank(out_DR.float(), in_RK.float(), left_out, change)


def _leading_vectors(matrix_DK: Tensor, rank: int) -> Tensor:
    """The first left singular vectors [D, R], the same for the same matrix on the same device."""
    least = min(matrix_DK.shape)
    if least <= _EXACT_BELOW:
        return torch.linalg.svd(matrix_DK, full_matrices=False).U[:, :rank]
    devices = [matrix_DK.device] if matrix_DK.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix_DK, q=min(rank + _SPARE, least), niter=_ROUNDS)[0][:, :rank]
