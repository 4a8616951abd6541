"""A Gaussian process over edits, told apart by what they do: a weight in every block, and whose direction.

Edits of equal weights are one edit, whatever parameters they were drawn with; and a weight that changes in one block of
many changes little. So the process learns from fewer edits than a sampler that takes parameters one by one (measured in
``docs/performance.md``). N edits that are known, M that are asked about, F features, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heretic_ds.search.space import MAX_WEIGHT_RANGES, PER_LAYER

_WIDTH = 0.35
"""Distance at which two edits' outputs are correlated by 0.6: a difference of weights in all writers of a component, as
root mean square over blocks."""
_INDEX, _SCOPE = 2.0, 3.0
"""How far apart directions are that lie a model's depth apart, and a global one is from those of the layers."""
_NOISE = 0.02
"""Share of the outputs' variance that edits do not explain."""


def features(params: Sequence[Mapping[str, Any]], n_layers: int) -> np.ndarray:
    """What edits are told apart by [N, F]."""
    block_L, parts = np.arange(n_layers), []

    def column(name: str) -> np.ndarray:
        return np.array([each[name] for each in params], dtype=float)[:, None]

    for component in MAX_WEIGHT_RANGES:
        most_N1 = column(f"{component}.max_weight").clip(min=0)
        distance_NL = np.abs(block_L - column(f"{component}.max_weight_position"))
        reach_N1, fraction_N1 = column(f"{component}.min_weight_distance"), column(f"{component}.min_weight_fraction")
        weight_NL = most_N1 * (1 + distance_NL / reach_N1 * (fraction_N1 - 1))
        parts.append(np.where(distance_NL > reach_N1, 0.0, weight_NL) / np.sqrt(n_layers))
    of_layers_N1 = np.array([each["direction_scope"] == PER_LAYER for each in params])[:, None]
    index_N1 = column("direction_index") / max(n_layers - 1, 1)
    return np.hstack([*parts, np.where(of_layers_N1, 0.0, _INDEX * index_N1), _SCOPE * of_layers_N1])


class Surrogate:
    """Mean and deviation of outputs at edits, given those of edits that are known."""

    def __init__(self, known_NF: np.ndarray, outputs_NO: np.ndarray) -> None:
        self._known_NF = known_NF
        self._mean_O, self._spread_O = outputs_NO.mean(axis=0), outputs_NO.std(axis=0) + 1e-9
        kernel_NN = correlation(known_NF, known_NF, _WIDTH) + _NOISE * np.eye(len(known_NF))
        self._root_NN = np.linalg.inv(np.linalg.cholesky(kernel_NN))
        self._weights_NO = self._root_NN.T @ (self._root_NN @ ((outputs_NO - self._mean_O) / self._spread_O))

    def at(self, asked_MF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, both [M, O]."""
        kernel_MN = correlation(asked_MF, self._known_NF, _WIDTH)
        mean_MO = kernel_MN @ self._weights_NO * self._spread_O + self._mean_O
        variance_M = 1 - ((kernel_MN @ self._root_NN.T) ** 2).sum(axis=1)
        return mean_MO, np.sqrt(variance_M.clip(min=1e-9))[:, None] * self._spread_O


def correlation(first_NF: np.ndarray, second_MF: np.ndarray, width: float) -> np.ndarray:
    """How alike edits are by their features, [N, M]: 1 where they are one, 0.6 at a distance of ``width``."""
    square_NM = (first_NF**2).sum(axis=1)[:, None] + (second_MF**2).sum(axis=1) - 2 * first_NF @ second_MF.T
    kernel_NM: np.ndarray = np.exp(-square_NM.clip(min=0) / (2 * width**2))
    return kernel_NM
