"""The search space: which numbers describe an edit, and their ranges for a model of L blocks.

The space is fixed, every number is sampled in every trial: a multivariate sampler learns only from parameters
that all trials share. So ``direction_index`` is sampled beside the scope even where the scope makes it
unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from heretic_ds.ablation.edit import Edit
from heretic_ds.ablation.profile import Profile

GLOBAL = "global"
PER_LAYER = "per layer"

MAX_WEIGHT_RANGES = {"attention": (0.8, 1.5), "mlp": (-0.25, 1.5)}
"""Range of ``max_weight`` by component. What is drawn below 0 counts as 0, so that a search can leave a
component alone with a probability of its own.
"""


def search_space(n_layers: int) -> dict[str, BaseDistribution]:
    """Distribution of every parameter, by name, for a model of ``n_layers`` blocks, 1 or more."""
    last = n_layers - 1
    space: dict[str, BaseDistribution] = {
        "direction_scope": CategoricalDistribution([GLOBAL, PER_LAYER]),
        "direction_index": FloatDistribution(0.4 * last, 0.9 * last),
    }
    for component, (low, high) in MAX_WEIGHT_RANGES.items():
        space[f"{component}.max_weight"] = FloatDistribution(low, high)
        space[f"{component}.max_weight_position"] = FloatDistribution(0.6 * last, last)
        space[f"{component}.min_weight_fraction"] = FloatDistribution(0.0, 1.0)
        space[f"{component}.min_weight_distance"] = FloatDistribution(1.0, max(0.6 * last, 1.0))
    return space


def edit_of(params: Mapping[str, Any]) -> Edit:
    """The edit that a full set of parameters describes; ``min_weight`` becomes absolute."""
    profiles = {}
    for component in MAX_WEIGHT_RANGES:
        max_weight = max(float(params[f"{component}.max_weight"]), 0.0)
        profiles[component] = Profile(
            max_weight=max_weight,
            max_weight_position=float(params[f"{component}.max_weight_position"]),
            min_weight=max_weight * float(params[f"{component}.min_weight_fraction"]),
            min_weight_distance=float(params[f"{component}.min_weight_distance"]),
        )
    is_global = params["direction_scope"] == GLOBAL
    return Edit(direction_index=float(params["direction_index"]) if is_global else None, profiles=profiles)


def known_params(params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The part of ``params`` that this space has and whose values lie in its ranges."""

    def fits(value: Any, distribution: BaseDistribution) -> bool:
        if isinstance(distribution, FloatDistribution):
            return isinstance(value, int | float) and distribution.low <= value <= distribution.high
        return isinstance(distribution, CategoricalDistribution) and value in distribution.choices

    return {name: params[name] for name, distribution in space.items() if fits(params.get(name), distribution)}
