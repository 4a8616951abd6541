"""Edits: removing directions from the weights that write to the residual stream.

Shapes: D width of the stream (a writer's output), K a writer's input, R directions of an edit (its rank), E experts, L
blocks; leading dimensions of weights (experts) are batch dimensions everywhere. A direction [D] is taken for R = 1.

All row-norm modes are one form. With n the row norms of W (1 in mode ``none``), N = diag(n), Ŵ = N⁻¹W, the rows of V
[R, D] orthonormal and λ the strength, the same for all of them:

    W' = diag(s) (W - λ U A),     U = N Vᵀ [D, R],   A = V Ŵ [R, K]

and in mode ``full``, with B = A Ŵᵀ [R, D] and G = V Bᵀ = A Aᵀ [R, R],

    s_i = (1 - 2 λ Σ_j V_ji B_ji + λ² Σ_jl V_ji G_jl V_li)^(-1/2),   else s = 1.

As λ is one number, the edit takes VᵀV alone: which orthonormal vectors span a subspace makes no difference. For R = 1
it is W' = diag(s) (W - λ u aᵀ), u = n∘v, a = Ŵᵀv, b = Ŵa and s_i = (1 - 2 λ v_i b_i + λ² v_i² (v·b))^(-1/2).

Since y = W x gives A x = Σ_i V_i y_i / n_i, the same edit acts on outputs without touching weights:

    W' x = s ∘ (y - λ U (P y)),     P = V N⁻¹.

Where the columns of W are split over ranks, n² and B are sums over columns: the callable ``reduce`` adds up a tensor
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


def reciprocal(norms_D: Tensor) -> Tensor:
    """1/n, with 0 for a zero row, whose normalised row is defined as zero."""
    return torch.where(norms_D > 0, 1 / norms_D, torch.zeros_like(norms_D))


def _rows(direction: Tensor) -> Tensor:
    """Directions [..., R, D], of which one may have been given as [D]."""
    return direction.unsqueeze(0) if direction.dim() == 1 else direction


def row_overlaps(weight_DK: Tensor, norms_D: Tensor, directions_ND: Tensor, reduce: Reduce | None = None) -> Tensor:
    """B = V Ŵ Ŵᵀ for N directions V at once: [..., N, D].

    Linear in V, so a table over all blocks' directions yields every later trial's by interpolation, without another
    pass over weights.
    """
    unit_DK = weight_DK.to(norms_D.dtype) * reciprocal(norms_D).unsqueeze(-1)
    overlaps_ND = (directions_ND.to(unit_DK) @ unit_DK) @ unit_DK.transpose(-1, -2)
    return overlaps_ND if reduce is None else reduce(overlaps_ND)


def row_scales(norms_D: Tensor, overlaps_RD: Tensor, direction_RD: Tensor, strength: float | Tensor) -> Tensor:
    """s [..., D] of mode ``full``. A row that the edit leaves nothing of (radicand at rounding) gets 0; a zero row
    gets 1."""
    removed_RD = strength * direction_RD
    if removed_RD.shape[-2] == 1:
        removed_D, overlaps_D = removed_RD.squeeze(-2), overlaps_RD.squeeze(-2)
        own = (direction_RD.squeeze(-2) * overlaps_D).sum(-1, keepdim=True)
        squared_D = removed_D.square() * own
        radicand_D = 1 - 2 * removed_D * overlaps_D + squared_D
    else:
        gram_RR = direction_RD @ overlaps_RD.transpose(-1, -2)
        squared_D = (removed_RD * (gram_RR @ removed_RD)).sum(-2)
        radicand_D = 1 - 2 * (removed_RD * overlaps_RD).sum(-2) + squared_D
    rounding_D = 8 * torch.finfo(radicand_D.dtype).eps * (1 + squared_D)
    scale_D = torch.where(
        radicand_D > rounding_D, radicand_D.clamp_min(rounding_D).rsqrt(), torch.zeros_like(radicand_D)
    )
    return torch.where(norms_D > 0, scale_D, torch.ones_like(scale_D))


def edit_weight(
    weight_DK: Tensor, direction_RD: Tensor, strength: float, row_norm: str, reduce: Reduce | None = None
) -> Tensor:
    """The edited weight W' [..., D, K] of one writer, computed in at least float32 and returned in that dtype.

    ``direction_RD`` is a unit vector [D] or R orthonormal ones, ``strength`` is λ, ``row_norm`` one of
    :data:`ROW_NORMS`.
    """
    edited_DK = torch.empty_like(weight_DK, dtype=torch.promote_types(weight_DK.dtype, torch.float32))
    _edit_into(edited_DK, weight_DK, _rows(direction_RD), strength, row_norm, reduce)
    return edited_DK


def exact_factors(weight_DK: Tensor, direction_RD: Tensor, strength: float, row_norm: str) -> tuple[Tensor, Tensor]:
    """-λU [..., D, R] and A [..., R, K] of one writer, at least float32: W' = diag(s) (W + (-λU) A).

    In the modes ``none`` and ``pre``, where s = 1, their product is all that the edit adds to the weight.
    """
    norms_D = row_norms(weight_DK, row_norm)
    direction_RD = _rows(direction_RD).to(norms_D)
    overlap_RK = _overlap_inputs(weight_DK.to(norms_D.dtype), norms_D, direction_RD)
    step_RD = -strength * norms_D.unsqueeze(-2) * direction_RD
    return step_RD.transpose(-1, -2), overlap_RK


def edit_weight_(
    weight_DK: Tensor, direction_RD: Tensor, strength: float, row_norm: str, reduce: Reduce | None = None
) -> None:
    """Edit a writer's weight in place, rounding once to its own dtype; experts [E, D, K] go one at a time, so that the
    working copy in float32 stays as small as one matrix. A matrix that is in float32 takes no copy."""
    direction_RD = _rows(direction_RD)
    if weight_DK.dim() == 3 and reduce is not None:
        _edit_split_experts_(weight_DK, direction_RD, strength, row_norm, reduce)
        return
    matrices = weight_DK.unbind(0) if weight_DK.dim() == 3 else (weight_DK,)
    for matrix_DK in matrices:
        _edit_into(matrix_DK, matrix_DK, direction_RD, strength, row_norm, reduce)


def _edit_into(
    target_DK: Tensor,
    weight_DK: Tensor,
    direction_RD: Tensor,
    strength: float,
    row_norm: str,
    reduce: Reduce | None,
) -> None:
    """Write the edited weight to ``target_DK``, which may be the weight itself."""
    norms_D = row_norms(weight_DK, row_norm, reduce)
    matrix_DK, direction_RD = weight_DK.to(norms_D.dtype), direction_RD.to(norms_D)
    overlap_RK = _overlap_inputs(matrix_DK, norms_D, direction_RD)
    overlaps_RD = None
    if row_norm == "full":
        overlaps_RD = _overlap_rows(matrix_DK, norms_D, overlap_RK)
        overlaps_RD = overlaps_RD if reduce is None else reduce(overlaps_RD)
    _write_edited(target_DK, matrix_DK, overlap_RK, norms_D, overlaps_RD, direction_RD, strength)


def _edit_split_experts_(
    weight_EDK: Tensor, direction_RD: Tensor, strength: float, row_norm: str, reduce: Reduce
) -> None:
    """Experts go one at a time twice, so that one sum over ranks serves all of them."""
    norms_ED = row_norms(weight_EDK, row_norm, reduce)
    direction_RD = direction_RD.to(norms_ED)
    experts = list(zip(weight_EDK.unbind(0), norms_ED.unbind(0), strict=True))
    overlaps: tuple[Tensor | None, ...] = (None,) * len(experts)
    if row_norm == "full":
        parts = []
        for expert_DK, norms_D in experts:
            matrix_DK = expert_DK.to(norms_D.dtype)
            parts.append(_overlap_rows(matrix_DK, norms_D, _overlap_inputs(matrix_DK, norms_D, direction_RD)))
        overlaps = reduce(torch.stack(parts)).unbind(0)
    for (expert_DK, norms_D), overlaps_RD in zip(experts, overlaps, strict=True):
        matrix_DK = expert_DK.to(norms_D.dtype)
        overlap_RK = _overlap_inputs(matrix_DK, norms_D, direction_RD)
        _write_edited(expert_DK, matrix_DK, overlap_RK, norms_D, overlaps_RD, direction_RD, strength)


def _overlap_inputs(matrix_DK: Tensor, norms_D: Tensor, direction_RD: Tensor) -> Tensor:
    """A = V Ŵ, [..., R, K]."""
    return (direction_RD * reciprocal(norms_D).unsqueeze(-2)) @ matrix_DK


def _overlap_rows(matrix_DK: Tensor, norms_D: Tensor, overlap_RK: Tensor) -> Tensor:
    """B = A Ŵᵀ, [..., R, D], over the columns at hand."""
    if overlap_RK.shape[-2] == 1:  # a product with a vector, which is computed otherwise than one with a matrix
        return ((matrix_DK @ overlap_RK.squeeze(-2).unsqueeze(-1)).squeeze(-1) * reciprocal(norms_D)).unsqueeze(-2)
    return (overlap_RK @ matrix_DK.transpose(-1, -2)) * reciprocal(norms_D).unsqueeze(-2)


def _write_edited(
    target_DK: Tensor,
    matrix_DK: Tensor,
    overlap_RK: Tensor,
    norms_D: Tensor,
    overlaps_RD: Tensor | None,
    direction_RD: Tensor,
    strength: float,
) -> None:
    """W' from A, n and, in mode ``full``, B. Rows need nothing of each other any more, and go some at a time, so that
    they may be written over the matrix itself and take little memory beside it."""
    step_DR = (strength * norms_D.unsqueeze(-2) * direction_RD).transpose(-1, -2)
    scale_D = None if overlaps_RD is None else row_scales(norms_D, overlaps_RD, direction_RD, strength)
    if overlap_RK.shape[-2] > 1:
        _write_along_several(target_DK, matrix_DK, step_DR, overlap_RK, scale_D)
        return
    rows, per_row = matrix_DK.shape[-2], matrix_DK.numel() // max(1, matrix_DK.shape[-2])
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, per_row))
    for first in range(0, rows, at_once):
        some = slice(first, first + at_once)
        edited_DK = step_DR[..., some, :] * overlap_RK
        torch.sub(matrix_DK[..., some, :], edited_DK, out=edited_DK)
        if scale_D is not None:
            edited_DK *= scale_D[..., some, None]
        target_DK[..., some, :].copy_(edited_DK)


def _write_along_several(
    target_DK: Tensor, matrix_DK: Tensor, step_DR: Tensor, overlap_RK: Tensor, scale_D: Tensor | None
) -> None:
    """The same for R > 1, in the target's memory where that is precise enough, else in the matrix's, a working copy."""
    edited_DK = target_DK if target_DK.dtype == matrix_DK.dtype else matrix_DK
    if edited_DK.data_ptr() != matrix_DK.data_ptr():
        edited_DK.copy_(matrix_DK)
    if edited_DK.dim() == 2:
        edited_DK.addmm_(step_DR, overlap_RK, alpha=-1)
    else:
        edited_DK.baddbmm_(step_DR, overlap_RK, alpha=-1)
    if scale_D is not None:
        edited_DK *= scale_D[..., None]
    if edited_DK is not target_DK:
        target_DK.copy_(edited_DK)


@dataclass(frozen=True)
class OutputOperator:
    """The edit of one writer in output space: y ↦ s ∘ (y - λU (P y)), y without its bias.

    For y [..., D] fields are [..., R, D] and [..., D], and broadcast: without more dimensions for one edit, with [B, 1]
    for rows of a batch that belong to different trials, with [E] for experts.
    """

    step_RD: Tensor
    """λ Uᵀ."""
    probe_RD: Tensor
    """P."""
    scale_D: Tensor | None
    """s, or None where it is 1."""

    def __call__(self, output_D: Tensor) -> Tensor:
        """Edit outputs [..., D] (bias excluded); computed in at least float32, returned in the output's dtype."""
        value_D = output_D.to(torch.promote_types(output_D.dtype, self.step_RD.dtype))
        if self.step_RD.shape[-2] == 1:
            step_D, probe_D = self.step_RD.squeeze(-2), self.probe_RD.squeeze(-2)
            edited_D = value_D - step_D * (value_D * probe_D).sum(-1, keepdim=True)
        else:
            found_R1 = self.probe_RD @ value_D.unsqueeze(-1)
            edited_D = value_D - (found_R1.transpose(-1, -2) @ self.step_RD).squeeze(-2)
        if self.scale_D is not None:
            edited_D = edited_D * self.scale_D
        return edited_D.to(output_D.dtype)


def output_operator(
    norms_D: Tensor, overlaps_RD: Tensor | None, direction_RD: Tensor, strength: float | Tensor
) -> OutputOperator:
    """The output-space form of an edit from what is known of the writer: n, and B for mode ``full`` (else None).

    ``strength`` may be a tensor that broadcasts against [..., R, D], for several trials at once; one direction may be
    given as [D], with B alike.
    """
    direction_RD = _rows(direction_RD.to(norms_D))
    step_RD = strength * norms_D.unsqueeze(-2) * direction_RD
    scale_D = None
    if overlaps_RD is not None:
        scale_D = row_scales(norms_D, _rows(overlaps_RD), direction_RD, strength)
    return OutputOperator(step_RD, direction_RD * reciprocal(norms_D).unsqueeze(-2), scale_D)
