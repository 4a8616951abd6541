"""One direction a layer, from a centre of the baseline prompts' residuals to one of the target prompts'.

Shapes: G groups, B prompts of a batch, L blocks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heretic_ds.ablation import behaviour_directions
from heretic_ds.directions.base import Captures, Found, Method, Request
from heretic_ds.prompts import TokenRows
from heretic_ds.world import World


class MeanDifference(Method):
    """Between the means (Arditi et al. 2024, arXiv 2406.11717, section 2.3), which are summed where prompts run."""

    name = "mean_difference"

    def find(self, engine: Captures, request: Request, world: World) -> Found:
        """See the base."""
        target_LD, baseline_LD = (
            engine.capture(prompts, request.winsorize_quantile) for prompts in (request.target, request.baseline)
        )
        return _between(target_LD, baseline_LD, request)


class MedianOfMeans(Method):
    """Between medians of the means of groups, component by component.

    Prompts are dealt to G groups in a random order that is always the same, as data sets often have one of their own.
    As long as fewer than half of the groups hold prompts that are unlike all others, what those are does not move the
    median far, whereas one such prompt can move a mean anywhere; where there are none the two agree up to their
    sampling error (Lugosi and Mendelson 2019, arXiv 1906.04280, section 2.1).

    Rank 0 takes every prompt's residuals as they come, and keeps the sums of groups: 8 G (L+1) D bytes, 11 MB for nine
    groups at 36 blocks and D = 4096.
    """

    name = "median_of_means"

    def find(self, engine: Captures, request: Request, world: World) -> Found:
        """See the base."""
        target_LD, baseline_LD = (
            self._centre(engine, prompts, request, world) for prompts in (request.target, request.baseline)
        )
        return _between(target_LD, baseline_LD, request)

    @staticmethod
    def _centre(engine: Captures, prompts: TokenRows, request: Request, world: World) -> Tensor:
        group_N = dealt(len(prompts), request.groups)
        groups = int(group_N.max()) + 1
        sum_GLD = torch.zeros(groups, request.entries, request.width, dtype=torch.float64)

        def take(places: Sequence[int], residual_LBD: Tensor) -> None:
            sum_GLD.index_add_(0, group_N[list(places)], residual_LBD.transpose(0, 1).double())

        engine.residuals(prompts, take, request.winsorize_quantile)
        return world.decide(lambda: middle(sum_GLD / torch.bincount(group_N)[:, None, None]))


def dealt(prompts: int, groups: int) -> Tensor:
    """The group [N] of each prompt: as many as asked for, or as there are prompts, equal but for one prompt."""
    return torch.randperm(prompts, generator=torch.Generator().manual_seed(0)) % groups


def middle(values_GLD: Tensor) -> Tensor:
    """Median over the first dimension, component by component; of an even number the mean of the middle two. Where one
    is no number there is none: residuals that overflow are not odd ones among others."""
    sorted_GLD, count = values_GLD.sort(dim=0).values, len(values_GLD)
    median_LD = (sorted_GLD[(count - 1) // 2] + sorted_GLD[count // 2]) / 2
    return torch.where(values_GLD.isfinite().all(dim=0), median_LD, torch.nan)


def _between(target_LD: Tensor, baseline_LD: Tensor, request: Request) -> Found:
    directions_LD = behaviour_directions(target_LD, baseline_LD, request.orthogonalize)
    return Found(directions_LD.unsqueeze(1), target_LD, baseline_LD)
