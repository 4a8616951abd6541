"""Directions of a behaviour in the residual stream, from the mean residuals of two kinds of prompts.

Shapes: B prompts of a batch, L blocks, D width. Residuals have L+1 entries: the embedding output, then the stream
after each block, the last of them after the final norm. Block i uses entry i+1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


def block_direction(directions_LD: Tensor, block: int, direction_index: float | None) -> Tensor:
    """Unit direction [D] that an edit uses at ``block``.

    ``direction_index`` None: the block's own. A float x: one direction for all blocks, interpolated between those of
    blocks floor(x) and floor(x)+1 and normalised again; past the last block it is the last block's.
    """
    if direction_index is None:
        return directions_LD[block + 1]
    last = directions_LD.shape[0] - 1
    below = int(direction_index)
    start, end = directions_LD[min(below + 1, last)], directions_LD[min(below + 2, last)]
    return _normalise(torch.lerp(start, end, direction_index - below))


def through_norm(direction_D: Tensor, gain_D: Tensor | None) -> Tensor:
    """The unit direction to remove *before* a norm with this gain so that ``direction_D`` is absent *after* it.

    The stream receives gain ∘ (y / rms(y)), whose component along v is (gain ∘ v)·y / rms(y).
    """
    return direction_D if gain_D is None else _normalise(gain_D.to(direction_D) * direction_D)


@dataclass(frozen=True)
class Ablation:
    """What all edits of a run share: the directions and the form of the edit."""

    directions_LD: Tensor
    """Unit directions [L+1, D], float64."""
    row_norm: str
    """One of :data:`heretic_ds.ablation.ROW_NORMS`."""
    through_norm: bool
    """Edit along the direction that a norm after the writer maps onto the stream's."""

    def writer_direction(self, block: int, gain_D: Tensor | None, direction_index: float | None) -> Tensor:
        """Unit direction [D] along which a writer of ``block`` is edited; ``gain_D`` is that of a norm after it."""
        direction_D = block_direction(self.directions_LD, block, direction_index)
        return through_norm(direction_D, gain_D) if self.through_norm else direction_D
