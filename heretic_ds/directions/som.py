"""Several directions a layer: from the baseline mean to each unit of a self-organising map of the target prompts.

After Piras et al. 2025 (arXiv 2511.08379), who show that a map of one unit is the mean, and so the difference of means
its special case. They fit a map of sixteen units and search for units whose directions, removed together, serve best;
here the map has as many units as an edit has directions, and all of them are used. An edit takes the subspace that they
span, whatever order or basis they come in.

Shapes: N prompts, R units, C columns of the map, L blocks, D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import gettempdir

import torch
from torch import Tensor

from heretic_ds.ablation import aligned, behaviour_directions, orthonormal
from heretic_ds.directions.base import Captures, Found, Method, Request
from heretic_ds.errors import UserError
from heretic_ds.geometry.store import ResidualStore
from heretic_ds.world import World

_ROUNDS = 50
"""Rounds of the map, in each of which every prompt counts once."""
_LAST_REACH = 0.3
"""Reach of a unit in the last round, in steps of the grid: a neighbour's prompts then count 0.4 %."""
_ITERATIONS = 8
"""Of the subspace iteration that finds the first two principal components."""


class SelfOrganisingMap(Method):
    """Directions to the units of a map, made orthonormal.

    Residuals of the target prompts, 4 (L+1) N D bytes, lie in a file without a name while maps are fitted, on rank 0, a
    layer at a time in memory; means of the baseline prompts are summed where they run.
    """

    name, many = "som", True

    def find(self, engine: Captures, request: Request, world: World) -> Found:
        """See the base. Raises UserError also where prompts are too few, or too alike, for so many directions."""
        count, rank = len(request.target), request.rank
        if count < rank:
            raise UserError(
                f"ablation.rank is {rank}, but there are {count} target train prompts; a map has no more units than "
                f"prompts: set ablation.rank={count} at most, or give more prompts as prompts.target.train"
            )
        baseline_LD = engine.capture(request.baseline, request.winsorize_quantile)
        stores: list[ResidualStore] = []  # rank 0's

        def open_store() -> None:
            folder = request.folder or Path(gettempdir())
            stores.append(ResidualStore(folder, request.entries, count, request.width))

        world.decide(open_store)
        engine.residuals(request.target, lambda *given: stores[0].put(*given), request.winsorize_quantile)

        def fit() -> Found:
            found = [
                _of_layer(entry, stores[0].layer(entry), baseline_D, request)
                for entry, baseline_D in enumerate(baseline_LD)
            ]
            basis_LRD = torch.stack([basis_RD for basis_RD, _ in found])
            if basis_LRD.isfinite().all():
                basis_LRD = torch.cat([basis_LRD[:1], aligned(basis_LRD[1:])])  # no block uses the first
            return Found(basis_LRD, torch.stack([mean_D for _, mean_D in found]), baseline_LD)

        return world.decide(fit, "fitting self-organising maps")


def _of_layer(entry: int, residual_ND: Tensor, baseline_D: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """The directions [R, D] of one entry of the stream, and the mean of its residuals."""
    mean_D = residual_ND.mean(0)
    if not (residual_ND.isfinite().all() and baseline_D.isfinite().all()):
        return mean_D.new_full((request.rank, len(mean_D)), math.nan), mean_D
    unit_RD = fit_map(residual_ND, request.rank)
    vectors_RD = behaviour_directions(unit_RD, baseline_D.expand_as(unit_RD), request.orthogonalize)
    if request.rank == 1:
        return vectors_RD, mean_D
    try:
        return orthonormal(vectors_RD)[0], mean_D
    except ValueError as error:
        if entry == 0:  # prompts that end in the same token have one embedding, and no block uses it
            return torch.zeros_like(vectors_RD), mean_D
        raise UserError(
            f"ablation.rank is {request.rank}, but after block {entry - 1} the residuals of the target train prompts "
            f"lie in fewer directions; set a lower ablation.rank, or give more prompts as prompts.target.train"
        ) from error


def fit_map(point_ND: Tensor, units: int) -> Tensor:
    """The units' weight vectors [R, D] of a self-organising map (Kohonen 1990) of points [N, D], float64.

    The units lie on a rectangular grid as near to a square as their number allows. They begin on the plane of the first
    two principal components, one standard deviation to each side, and are then moved all at once, which makes the
    result independent of the order of points (the batch map, Kohonen 2013):

        w_j = Σ_i h(c_i, j) x_i / Σ_i h(c_i, j),     h(c, j) = exp(-|g_c - g_j|² / 2σ²),

    with c_i the unit nearest to x_i, g the places on the grid, and σ, the reach, from half the grid's longer side down
    to 0.3 in equal ratios. A unit that is nearest to no point takes the one that is farthest from its own. One unit is
    the mean. The same points give the same units on the same machine.
    """
    mean_D = point_ND.double().mean(0)
    if units == 1:
        return mean_D[None]
    centred_ND = point_ND.double() - mean_D
    grid_R2, columns = _grid(units)
    unit_RD, distance_RR = _first_units(centred_ND, grid_R2), torch.cdist(grid_R2, grid_R2)
    first_reach = max(columns / 2, _LAST_REACH)
    for round_ in range(_ROUNDS):
        reach = first_reach * (_LAST_REACH / first_reach) ** (round_ / (_ROUNDS - 1))
        near_RR = torch.exp(-distance_RR.square() / (2 * reach**2))
        nearest_N = _nearest(centred_ND, unit_RD)
        sum_RD = torch.zeros_like(unit_RD).index_add_(0, nearest_N, centred_ND)
        weight_R = near_RR @ torch.bincount(nearest_N, minlength=units).double()
        unit_RD = near_RR @ sum_RD / weight_R[:, None]
    return mean_D + unit_RD


def _nearest(point_ND: Tensor, unit_RD: Tensor) -> Tensor:
    """The unit [N] of each point; every unit has one, as there are no fewer points."""
    far_N, nearest_N = torch.cdist(point_ND, unit_RD).min(-1)
    count_R = torch.bincount(nearest_N, minlength=len(unit_RD))
    for empty in (count_R == 0).nonzero()[:, 0].tolist():
        taken = int(torch.where(count_R[nearest_N] > 1, far_N, -1.0).argmax())
        count_R[nearest_N[taken]] -= 1
        nearest_N[taken], far_N[taken], count_R[empty] = empty, 0.0, 1
    return nearest_N


def _grid(units: int) -> tuple[Tensor, int]:
    """Places [R, 2] of units in rows and columns, in steps, and the number of columns."""
    rows = next(rows for rows in range(math.isqrt(units), 0, -1) if units % rows == 0)
    columns = units // rows
    place_R = torch.arange(units)
    return torch.stack([place_R // columns, place_R % columns], dim=1).double(), columns


def _first_units(centred_ND: Tensor, grid_R2: Tensor) -> Tensor:
    """Units on the plane of the two principal components, the longer side of the grid along the first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, size_2, axis_D2 = torch.svd_lowrank(centred_ND, q=min(2, *centred_ND.shape), niter=_ITERATIONS)
    middle_2 = grid_R2.max(0).values / 2
    place_R2 = ((grid_R2 - middle_2) / middle_2.clamp_min(0.5)).flip(1)  # from -1 to 1
    return place_R2[:, : len(size_2)] * size_2 / math.sqrt(len(centred_ND)) @ axis_D2.T
