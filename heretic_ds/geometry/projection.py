"""Residuals of one layer on a plane, to look at.

Shapes: N prompts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heretic_ds.errors import UserError

METHODS = ("pca", "pacmap")


@dataclass(frozen=True)
class Projection:
    """Points on a plane."""

    point_N2: Tensor
    explained: tuple[float, float] | None
    """Shares of the variance that the two axes hold; None where axes have no such meaning, or nothing varies."""


def pca(point_ND: Tensor, is_target_N: Tensor) -> Projection:
    """The two principal components of points [N, D] around their mean, in float64.

    From the products [N, N] of the centred points: with X Xᵀ = U S Uᵀ the coordinates are U √S, and the axes hold the
    shares S / tr(X Xᵀ) of the variance. The first axis points from baseline to target, the second so that the point
    farthest from 0 on it is positive: signs, which are free, do not change from run to run.
    """
    centred_ND = point_ND.double() - point_ND.double().mean(0)
    product_NN = centred_ND @ centred_ND.T
    value_N, vector_NN = torch.linalg.eigh(product_NN)  # ascending
    found_2 = value_N.flip(0)[:2].clamp_min(0)
    point_N2 = vector_NN.flip(1)[:, :2] * found_2.sqrt()
    if len(found_2) < 2:  # one prompt
        found_2 = torch.nn.functional.pad(found_2, (0, 1))
        point_N2 = torch.nn.functional.pad(point_N2, (0, 1))
    ahead = point_N2[is_target_N, 0].mean() - point_N2[~is_target_N, 0].mean()
    if ahead < 0:
        point_N2[:, 0] *= -1
    second_N = point_N2[:, 1]
    if second_N[second_N.abs().argmax()] < 0:
        point_N2[:, 1] *= -1
    total = product_NN.trace().item()
    if total <= 0:
        return Projection(torch.zeros_like(point_N2), None)
    first, second = (found_2 / total).tolist()
    return Projection(point_N2, (first, second))


def require_pacmap() -> None:
    """Raises UserError, with the command that installs it, where PaCMAP is not there."""
    try:
        import pacmap  # noqa: F401
    except ImportError as error:
        raise UserError(
            'task.projection=pacmap needs PaCMAP: pip install "heretic-ds[report]", or leave task.projection=pca'
        ) from error


def pacmap(point_ND: Tensor) -> Projection:
    """PaCMAP's plane (Wang et al. 2021, JMLR 22(201)), which keeps neighbours and the coarse shape; axes mean nothing.

    Raises UserError where it is not installed.
    """
    require_pacmap()
    from pacmap import PaCMAP

    neighbours = max(1, min(10, (len(point_ND) - 1) // 2))
    reducer = PaCMAP(n_components=2, n_neighbors=neighbours, random_state=0)
    found = reducer.fit_transform(point_ND.float().numpy(), init="pca")
    return Projection(torch.from_numpy(found).double(), None)


def spread_out(blocks: int, most: int) -> list[int]:
    """At most so many of the blocks, evenly spread, the last one among them."""
    count = min(most, blocks)
    return sorted({blocks - 1 - round(place * (blocks - 1) / max(1, count - 1)) for place in range(count)})
