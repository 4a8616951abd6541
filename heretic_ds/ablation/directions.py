"""Directions of a behaviour in the residual stream, from the mean residuals of two kinds of prompts.

Shapes: B prompts of a batch, L blocks, D width, R directions of an edit (its rank). Residuals have L+1 entries: the
embedding output, then the stream after each block, the last of them after the final norm. Block i uses entry i+1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_DEPENDENT = 1e-9
"""Part of a vector that others have to leave, or it counts as made of them."""
_MIXTURES = 64
"""As many as a pass has edits at most."""


def _normalise(vectors: Tensor) -> Tensor:
    """Unit vectors along the last dimension; a zero vector stays zero."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny), torch.zeros_like(vectors))


def winsorize(residual_BLD: Tensor, quantile: float) -> Tensor:
    """Clamp every residual's components to the ``quantile`` of their absolute values.

    Tames the few huge activations that dominate the mean in some models. ``quantile`` is in (0, 1]; 1 changes nothing.
    """
    if quantile >= 1.0:
        return residual_BLD
    bound_BL1 = torch.quantile(residual_BLD.abs(), quantile, dim=-1, keepdim=True)
    return residual_BLD.clamp(-bound_BL1, bound_BL1)


class ResidualMeans:
    """Running mean of residuals in float64: memory of one [L+1, D] table however many prompts there are."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_LD: Tensor | None = None

    def update(self, residual_BLD: Tensor) -> None:
        """Add the residuals [B, L+1, D] of one batch."""
        batch_LD = residual_BLD.sum(dim=0, dtype=torch.float64).cpu()
        self._sum_LD = batch_LD if self._sum_LD is None else self._sum_LD + batch_LD
        self.count += residual_BLD.shape[0]

    def mean(self, total: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        """Mean residuals [L+1, D], float64, on the CPU. ``total`` adds up a tensor over those who share the work."""
        if self._sum_LD is None:
            raise ValueError("no residuals were added, so there is no mean")
        count = total(torch.tensor(float(self.count), dtype=torch.float64))
        return total(self._sum_LD) / count


def behaviour_directions(target_LD: Tensor, baseline_LD: Tensor, orthogonalize: bool) -> Tensor:
    """Unit directions [L+1, D] from the baseline's mean residuals to the target's.

    Difference of means (Arditi et al. 2024, arXiv 2406.11717, section 2.3). With ``orthogonalize`` only the part
    orthogonal to the baseline mean's own direction is kept, so that removing it leaves baseline behaviour alone.
    An entry where the two means agree (such as the embedding of a last token that all prompts share) is zero.
    """
    direction_LD = _normalise(target_LD.double() - baseline_LD.double())
    if orthogonalize:
        baseline_unit_LD = _normalise(baseline_LD.double())
        overlap_L1 = (direction_LD * baseline_unit_LD).sum(-1, keepdim=True)
        direction_LD = _normalise(direction_LD - overlap_L1 * baseline_unit_LD)
    return direction_LD


def orthonormal(vectors_RD: Tensor) -> tuple[Tensor, Tensor]:
    """V [R, D] with orthonormal rows that span what R independent vectors X span, and T [R, R] with V = T X.

    By the QR decomposition of Xᵀ with a positive diagonal, which makes both unique (they are those of Gram and
    Schmidt). Vectors that are all zero stay so. Raises ValueError where one depends on those before it.
    """
    lengths_R = torch.linalg.vector_norm(vectors_RD, dim=-1)
    if not lengths_R.any():
        return torch.zeros_like(vectors_RD), vectors_RD.new_zeros(len(vectors_RD), len(vectors_RD))
    unit_DR, upper_RR = torch.linalg.qr(vectors_RD.T)
    diagonal_R = upper_RR.diagonal()
    if len(diagonal_R) < len(vectors_RD) or not (diagonal_R.abs() > _DEPENDENT * lengths_R).all():
        raise ValueError(f"{len(vectors_RD)} directions are not independent of each other")
    signs_R = diagonal_R.sign()
    lower_RR = signs_R * upper_RR.T  # X = lower V
    identity_RR = torch.eye(len(lower_RR), dtype=lower_RR.dtype, device=lower_RR.device)
    return (unit_DR * signs_R).T, torch.linalg.solve_triangular(lower_RR, identity_RR, upper=False)


def aligned(directions_LRD: Tensor) -> Tensor:
    """Bases of the same subspaces, each as near as may be to the one before it.

    Rows of neighbouring entries have nothing to do with each other where they were found entry by entry, so that a
    mixture of them would be neither's. Rotating V_l within its subspace so that Σ_j |v_l,j - v_(l-1),j|² is least
    (the orthogonal Procrustes problem, Schönemann 1966: V_l V_(l-1)ᵀ = P S Qᵀ, rotated by Q Pᵀ) leaves V_l V_(l-1)ᵀ
    symmetric and without negative eigenvalues: any mixture with weights 1 - f and f then has R independent rows, with
    singular values of at least 1/√2.
    """
    rows_RD = [directions_LRD[0]]
    for direction_RD in directions_LRD[1:]:
        left_RR, _, right_RR = torch.linalg.svd(direction_RD @ rows_RD[-1].T)
        rows_RD.append((left_RR @ right_RR).T @ direction_RD)
    return torch.stack(rows_RD)


def _unit(vectors_RD: Tensor) -> Tensor:
    """Orthonormal rows that span the same; of one vector [D] or [1, D] the unit vector."""
    return _normalise(vectors_RD) if vectors_RD.dim() == 1 or len(vectors_RD) == 1 else orthonormal(vectors_RD)[0]


def block_direction(directions: Tensor, block: int, direction_index: float | None) -> Tensor:
    """What an edit removes at ``block``: a unit direction [D] of directions [L+1, D], or R orthonormal ones [R, D] of
    [L+1, R, D].

    ``direction_index`` None: the block's own. A float x: the same for all blocks, interpolated between those of
    blocks floor(x) and floor(x)+1, vector by vector, and made orthonormal again; past the last block it is the last
    block's.
    """
    return directions[block + 1] if direction_index is None else _unit(_between(directions, direction_index))


def _between(directions: Tensor, direction_index: float) -> Tensor:
    """The mixture of two blocks' directions, not normalised."""
    last, below = directions.shape[0] - 1, int(direction_index)
    start, end = directions[min(below + 1, last)], directions[min(below + 2, last)]
    return torch.lerp(start, end, direction_index - below)


def through_norm(direction: Tensor, gain_D: Tensor | None) -> Tensor:
    """What to remove *before* a norm with this gain so that ``direction`` [D], or [R, D], is absent *after* it.

    The stream receives gain ∘ (y / rms(y)), whose component along v is (gain ∘ v)·y / rms(y).
    """
    return direction if gain_D is None else _unit(gain_D.to(direction) * direction)


@dataclass(frozen=True)
class Ablation:
    """What all edits of a run share: the directions and the form of the edit."""

    directions_LRD: Tensor
    """Orthonormal directions [L+1, R, D], float64; those of R = 1 may be given as [L+1, D]."""
    row_norm: str
    """One of :data:`heretic_ds.ablation.ROW_NORMS`."""
    through_norm: bool
    """Edit along the directions that a norm after the writer maps onto the stream's."""
    _mixed: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.directions_LRD.dim() == 2:
            object.__setattr__(self, "directions_LRD", self.directions_LRD.unsqueeze(1))

    @property
    def rank(self) -> int:
        """R."""
        return self.directions_LRD.shape[1]

    @property
    def stored(self) -> Tensor:
        """The directions as files hold them: [L+1, D] where R = 1, else [L+1, R, D]."""
        return self.directions_LRD.squeeze(1) if self.rank == 1 else self.directions_LRD

    def fits(self, n_blocks: int, width: int) -> bool:
        """Whether the directions are those of a model of this shape."""
        shape = tuple(self.directions_LRD.shape)
        return len(shape) == 3 and shape[0] == n_blocks + 1 and 0 < shape[1] <= width == shape[2]

    def mixed(self, direction_index: float) -> tuple[Tensor, Tensor]:
        """What :func:`orthonormal` makes of the mixture of two blocks' directions. All writers of an edit share it, so
        the latest ones are kept."""
        if direction_index not in self._mixed:
            if len(self._mixed) >= _MIXTURES:
                self._mixed.clear()
            self._mixed[direction_index] = orthonormal(_between(self.directions_LRD, direction_index))
        return self._mixed[direction_index]

    def writer_directions(self, block: int, gain_D: Tensor | None, direction_index: float | None) -> Tensor:
        """Orthonormal directions [R, D] along which a writer of ``block`` is edited; ``gain_D`` is that of a norm
        after it."""
        if direction_index is None or self.rank == 1:
            direction_RD = block_direction(self.directions_LRD, block, direction_index)
        else:
            direction_RD = self.mixed(direction_index)[0]
        return through_norm(direction_RD, gain_D) if self.through_norm else direction_RD
