"""The area that trials dominate in the plane of refusals and KL: what a screened search makes as large as it can.

Both coordinates are minimised: a share of the original's refusals, and the height of a KL divergence, its logarithm
above or below the target. N points, S stairs of a front.
"""

from __future__ import annotations

import math

import numpy as np

LEAST_KL, MOST_KL = 1e-6, 1.0
"""Nats below which a KL divergence is as good as none, and beyond which nothing counts."""
_BELOW = 0.5
"""What a decade of KL below the target is worth beside one above it."""


def height(kl: np.ndarray, target: float) -> np.ndarray:
    """Decades of KL above the target; those below it count less."""
    decades = np.log10(np.maximum(kl, LEAST_KL) / target)
    return np.where(decades < 0, _BELOW * decades, decades)


def front(points_N2: np.ndarray, most: float) -> np.ndarray:
    """Places of the points that no other beats and that lie below (1, ``most``), by their first coordinate."""
    places, lowest = [], most
    for at in np.lexsort((points_N2[:, 1], points_N2[:, 0])):
        first, second = points_N2[at]
        if first < 1.0 and second < lowest:
            places.append(int(at))
            lowest = second
    return np.array(places, dtype=int)


def gains(points_N2: np.ndarray, known_M2: np.ndarray, most: float) -> np.ndarray:
    """Area below (1, ``most``) that each point would add to what known ones dominate."""
    stairs_S2 = known_M2[front(known_M2, most)]
    edge_S = np.concatenate([[-math.inf], stairs_S2[:, 0], [1.0]])
    height_S = np.concatenate([[most], stairs_S2[:, 1]])
    width_NS = np.minimum(edge_S[1:], 1.0) - np.maximum(edge_S[:-1], points_N2[:, :1])
    found: np.ndarray = (width_NS.clip(min=0) * (height_S - points_N2[:, 1:]).clip(min=0)).sum(axis=1)
    return found
