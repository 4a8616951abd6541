"""Edits: removing a direction from the weights that write to the residual stream.

Shapes: D width of the stream (a writer's output), K a writer's input, E experts, L blocks; leading dimensions of
weights (experts) are batch dimensions everywhere.

All row-norm modes are one form. With n the row norms of W (1 in mode ``none``), Ŵ = diag(1/n) W, v the unit direction
and λ the strength:

    W' = diag(s) (W - λ u aᵀ),     u = n∘v,   a = Ŵᵀ v

and in mode ``full``, with b = Ŵ a,   s_i = (1 - 2 λ v_i b_i + λ² v_i² (v·b))^(-1/2),   else s = 1.

Since y = W x gives aᵀx = (v/n)·y, the same edit acts on outputs without touching weights:

    W' x = s ∘ (y - λ u (w·y)),     w = v/n.

Where the columns of W are split over ranks, n² and b are sums over columns: the callable ``reduce`` adds up a tensor
over the ranks, in place or not, and returns it. All else needs no other rank's columns.

Weight orthogonalisation is from Arditi et al. 2024 (arXiv 2406.11717, section 4.1); the norm-preserving form is
derived in ``docs/mathematics.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heretic_ds.ablation.profile import Profile

ROW_NORMS = ("none", "pre", "full")
"""``none``: plain projection. ``pre``: the projection of the row-normalised matrix, rows scaled back. ``full``: that,
with every row brought back to its old norm."""

_NUMBERS_AT_ONCE = 2**21
"""Of a matrix that is edited, so many are computed before they are written: 8 MiB in float32."""

Reduce = Callable[[Tensor], Tensor]
"""Adds up a tensor over the ranks that hold parts of a writer."""


@dataclass(frozen=True)
class Edit:
    """What one trial does to all writers."""

    direction_index: float | None
    """One global direction interpolated at this block, or None for every block's own."""
    profiles: Mapping[str, Profile]
    """Profile of each component."""

    def strength(self, component: str, block: int) -> float:
        """Ablation weight λ of one writer; 0.0 where it is not edited."""
        profile = self.profiles.get(component)
        return 0.0 if profile is None else profile.weight(block)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, as results and manifests keep them."""
        profiles = {component: profile.to_dict() for component, profile in self.profiles.items()}
        return {"direction_index": self.direction_index, "profiles": profiles}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        """The inverse of :meth:`to_dict`."""
        profiles = {component: Profile(**numbers) for component, numbers in data["profiles"].items()}
        return cls(direction_index=data["direction_index"], profiles=profiles)


def row_norms(weight_DK: Tensor, row_norm: str, reduce: Reduce | None = None) -> Tensor:
    """n [..., D] of the formulas, at least float32: the rows' norms, or ones in mode ``none``."""
    dtype = torch.promote_types(weight_DK.dtype, torch.float32)
    if row_norm == "none":
        return torch.ones(weight_DK.shape[:-1], dtype=dtype, device=weight_DK.device)
    norms_D = torch.linalg.vector_norm(weight_DK, dim=-1, dtype=dtype)
    return norms_D if reduce is None else reduce(norms_D.square()).sqrt()


def _reciprocal(norms_D: Tensor) -> Tensor:
    """1/n, with 0 for a zero row, whose normalised row is defined as zero."""
    return torch.where(norms_D > 0, 1 / norms_D, torch.zeros_like(norms_D))


def row_overlaps(weight_DK: Tensor, norms_D: Tensor, directions_ND: Tensor, reduce: Reduce | None = None) -> Tensor:
    """b = Ŵ Ŵᵀ v for N directions at once: [..., N, D].

    Linear in v, so a table over all blocks' directions yields every later trial's b by interpolation, without another
    pass over weights.
    """
    unit_DK = weight_DK.to(norms_D.dtype) * _reciprocal(norms_D).unsqueeze(-1)
    overlaps_ND = (directions_ND.to(unit_DK) @ unit_DK) @ unit_DK.transpose(-1, -2)
    return overlaps_ND if reduce is None else reduce(overlaps_ND)


def _row_scales(norms_D: Tensor, overlaps_D: Tensor, direction_D: Tensor, strength: float | Tensor) -> Tensor:
    """s of mode ``full``. A row that the edit leaves nothing of (radicand at rounding) gets 0; a zero row gets 1."""
    removed_D = strength * direction_D
    squared_D = removed_D.square() * (direction_D * overlaps_D).sum(-1, keepdim=True)
    radicand_D = 1 - 2 * removed_D * overlaps_D + squared_D
    rounding_D = 8 * torch.finfo(radicand_D.dtype).eps * (1 + squared_D)
    scale_D = torch.where(
        radicand_D > rounding_D, radicand_D.clamp_min(rounding_D).rsqrt(), torch.zeros_like(radicand_D)
    )
    return torch.where(norms_D > 0, scale_D, torch.ones_like(scale_D))


def edit_weight(
    weight_DK: Tensor, direction_D: Tensor, strength: float, row_norm: str, reduce: Reduce | None = None
) -> Tensor:
    """The edited weight W' [..., D, K] of one writer, computed in at least float32 and returned in that dtype.

    ``direction_D`` is a unit vector, ``strength`` is λ, ``row_norm`` one of :data:`ROW_NORMS`.
    """
    edited_DK = torch.empty_like(weight_DK, dtype=torch.promote_types(weight_DK.dtype, torch.float32))
    _edit_into(edited_DK, weight_DK, direction_D, strength, row_norm, reduce)
    return edited_DK


def rank_one(weight_DK: Tensor, direction_D: Tensor, strength: float, row_norm: str) -> tuple[Tensor, Tensor]:
    """-λu [..., D] and a [..., K] of one writer, at least float32: W' = diag(s) (W + (-λu) aᵀ).

    In the modes ``none`` and ``pre``, where s = 1, their product is all that the edit adds to the weight.
    """
    norms_D = row_norms(weight_DK, row_norm)
    direction_D = direction_D.to(norms_D)
    overlap_K = _overlap_inputs(weight_DK.to(norms_D.dtype), norms_D, direction_D)
    return -strength * norms_D * direction_D, overlap_K


def edit_weight_(
    weight_DK: Tensor, direction_D: Tensor, strength: float, row_norm: str, reduce: Reduce | None = None
) -> None:
    """Edit a writer's weight in place, rounding once to its own dtype; experts [E, D, K] go one at a time, so that the
    working copy in float32 stays as small as one matrix. A matrix that is in float32 takes no copy."""
    if weight_DK.dim() == 3 and reduce is not None:
        _edit_split_experts_(weight_DK, direction_D, strength, row_norm, reduce)
        return
    matrices = weight_DK.unbind(0) if weight_DK.dim() == 3 else (weight_DK,)
    for matrix_DK in matrices:
        _edit_into(matrix_DK, matrix_DK, direction_D, strength, row_norm, reduce)


def _edit_into(
    target_DK: Tensor,
    weight_DK: Tensor,
    direction_D: Tensor,
    strength: float,
    row_norm: str,
    reduce: Reduce | None,
) -> None:
    """Write the edited weight to ``target_DK``, which may be the weight itself."""
    norms_D = row_norms(weight_DK, row_norm, reduce)
    matrix_DK, direction_D = weight_DK.to(norms_D.dtype), direction_D.to(norms_D)
    overlap_K = _overlap_inputs(matrix_DK, norms_D, direction_D)
    overlaps_D = None
    if row_norm == "full":
        overlaps_D = _overlap_rows(matrix_DK, norms_D, overlap_K)
        overlaps_D = overlaps_D if reduce is None else reduce(overlaps_D)
    _write_edited(target_DK, matrix_DK, overlap_K, norms_D, overlaps_D, direction_D, strength)


def _edit_split_experts_(
    weight_EDK: Tensor, direction_D: Tensor, strength: float, row_norm: str, reduce: Reduce
) -> None:
    """Experts go one at a time twice, so that one sum over ranks serves all of them."""
    norms_ED = row_norms(weight_EDK, row_norm, reduce)
    direction_D = direction_D.to(norms_ED)
    experts = list(zip(weight_EDK.unbind(0), norms_ED.unbind(0), strict=True))
    overlaps: tuple[Tensor | None, ...] = (None,) * len(experts)
    if row_norm == "full":
        parts = []
        for expert_DK, norms_D in experts:
            matrix_DK = expert_DK.to(norms_D.dtype)
            parts.append(_overlap_rows(matrix_DK, norms_D, _overlap_inputs(matrix_DK, norms_D, direction_D)))
        overlaps = reduce(torch.stack(parts)).unbind(0)
    for (expert_DK, norms_D), overlaps_D in zip(experts, overlaps, strict=True):
        matrix_DK = expert_DK.to(norms_D.dtype)
        overlap_K = _overlap_inputs(matrix_DK, norms_D, direction_D)
        _write_edited(expert_DK, matrix_DK, overlap_K, norms_D, overlaps_D, direction_D, strength)


def _overlap_inputs(matrix_DK: Tensor, norms_D: Tensor, direction_D: Tensor) -> Tensor:
    """a = Ŵᵀ v, [..., K]."""
    return ((direction_D * _reciprocal(norms_D)).unsqueeze(-2) @ matrix_DK).squeeze(-2)


def _overlap_rows(matrix_DK: Tensor, norms_D: Tensor, overlap_K: Tensor) -> Tensor:
    """b = Ŵ a, [..., D], over the columns at hand."""
    return (matrix_DK @ overlap_K.unsqueeze(-1)).squeeze(-1) * _reciprocal(norms_D)


def _write_edited(
    target_DK: Tensor,
    matrix_DK: Tensor,
    overlap_K: Tensor,
    norms_D: Tensor,
    overlaps_D: Tensor | None,
    direction_D: Tensor,
    strength: float,
) -> None:
    """W' from a, n and, in mode ``full``, b. Rows need nothing of each other any more, and go some at a time, so that
    they may be written over the matrix itself and take little memory beside it."""
    step_D = strength * norms_D * direction_D
    scale_D = None if overlaps_D is None else _row_scales(norms_D, overlaps_D, direction_D, strength)
    rows, per_row = matrix_DK.shape[-2], matrix_DK.numel() // max(1, matrix_DK.shape[-2])
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, per_row))
    for first in range(0, rows, at_once):
        some = slice(first, first + at_once)
        edited_DK = step_D[..., some, None] * overlap_K.unsqueeze(-2)
        torch.sub(matrix_DK[..., some, :], edited_DK, out=edited_DK)
        if scale_D is not None:
            edited_DK *= scale_D[..., some, None]
        target_DK[..., some, :].copy_(edited_DK)


@dataclass(frozen=True)
class OutputOperator:
    """The edit of one writer in output space: y ↦ s ∘ (y - λu (w·y)), y without its bias.

    Each field broadcasts against y [..., D]: [D] for one edit, [B, 1, D] for rows of a batch that belong to different
    trials, [E, D] for experts.
    """

    step_D: Tensor
    """λ u."""
    probe_D: Tensor
    """w."""
    scale_D: Tensor | None
    """s, or None where it is 1."""

    def __call__(self, output_D: Tensor) -> Tensor:
        """Edit outputs [..., D] (bias excluded); computed in at least float32, returned in the output's dtype."""
        value_D = output_D.to(torch.promote_types(output_D.dtype, self.step_D.dtype))
        edited_D = value_D - self.step_D * (value_D * self.probe_D).sum(-1, keepdim=True)
        if self.scale_D is not None:
            edited_D = edited_D * self.scale_D
        return edited_D.to(output_D.dtype)


def output_operator(
    norms_D: Tensor, overlaps_D: Tensor | None, direction_D: Tensor, strength: float | Tensor
) -> OutputOperator:
    """The output-space form of an edit from what is known of the writer: n, and b for mode ``full`` (else None).

    ``strength`` may be a tensor that broadcasts against [..., D], for several trials at once.
    """
    direction_D = direction_D.to(norms_D)
    scale_D = None if overlaps_D is None else _row_scales(norms_D, overlaps_D, direction_D, strength)
    return OutputOperator(
        step_D=strength * norms_D * direction_D, probe_D=direction_D * _reciprocal(norms_D), scale_D=scale_D
    )
