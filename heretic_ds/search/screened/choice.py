"""Which candidates could be on the front: what they would be scored, told from what they were screened by.

A candidate has a refusal likelihood s and a KL divergence k, both on a part of the prompts; a trial has in addition its
share r of the original's refusals and its KL divergence, on all of them. The share is taken for s plus the mean
residual r - s of the trials that are near in s; the KL for k times the trials' mean ratio; what is left of residuals
and ratios says how far off both may be. Chosen is whoever can be expected to fill most of what the area that the trials
dominate lacks, once with heights of KL (:mod:`heretic_ds.search.screened.area`) and once with KL as it is, which the
last few refusals decide: the sum of both parts. N candidates, K trials among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heretic_ds.search.screened.area import LEAST_KL, MOST_KL, gains, height

_WIDTH = 0.12
"""Distance in s at which a trial's residual counts 0.6 of what it does at none."""
_DOUBT = 0.5
"""Trials that a prediction is worth which knows of none: residuals and ratios are drawn towards none that much."""
_SHARE_DEVIATION, _KL_DEVIATION = 0.015, 0.05
"""How far a share and a logarithm of KL lie from what is told for them, as far as no trial says it."""
_SUPPOSED = 2
"""Trials that those deviations are worth."""
_WIDER = (1, 4, 16)
"""Times the deviations that are tried until a candidate can be expected to add something."""


@dataclass(frozen=True)
class Candidate:
    """One that was screened."""

    likelihood: float
    kl: float
    taken: bool = False
    """Is a trial, or will be one in this pass."""
    share: float | None = None
    """As a trial: refusals as a share of the original's; None where it is none, or was not scored yet."""
    scored_kl: float | None = None


def pick(candidates: Sequence[Candidate], kl_target: float) -> int:
    """Place of the candidate that should be scored next. Raises ValueError where all are taken."""
    free_N = np.array([not candidate.taken for candidate in candidates], dtype=bool)
    if not free_N.any():
        raise ValueError("every candidate is a trial already")
    told = _told(candidates)
    known_N2 = np.stack([told.share_N, told.kl_N], axis=1)
    for at, candidate in enumerate(candidates):
        if candidate.share is not None and candidate.scored_kl is not None:
            known_N2[at] = candidate.share, candidate.scored_kl
    for wider in _WIDER:
        expected_N = np.zeros(len(candidates))
        for points_N2, weight in told.may_be(wider):
            expected_N += weight * _filled(points_N2, known_N2[~free_N], kl_target)
        if expected_N[free_N].max() > 0:
            return int(np.where(free_N, expected_N, -1.0).argmax())
    return int(np.where(free_N, told.kl_N, np.inf).argmin())


def _filled(points_N2: np.ndarray, known_M2: np.ndarray, kl_target: float) -> np.ndarray:
    """How much of what known points leave open each point of (share, KL) would fill, the sum of both measures."""

    def heights(points_N2: np.ndarray) -> np.ndarray:
        return np.stack([points_N2[:, 0], height(points_N2[:, 1], kl_target)], axis=1)

    best_12, most_12 = np.array([[0.0, LEAST_KL]]), np.array([[1.0, MOST_KL]])
    filled_N = np.zeros(len(points_N2))
    for scaled in (heights, np.asarray):
        known, most = scaled(known_M2), float(scaled(most_12)[0, 1])
        left = gains(scaled(best_12), known, most)[0]
        filled_N += gains(scaled(points_N2), known, most) / max(left, 1e-9)
    return filled_N


@dataclass(frozen=True)
class _Told:
    """What candidates would be scored, as far as that can be told."""

    share_N: np.ndarray
    kl_N: np.ndarray
    share_deviation_N: np.ndarray
    kl_deviation: float
    """Of the logarithm."""

    def may_be(self, wider: float) -> Iterator[tuple[np.ndarray, float]]:
        """Points of (share, KL) at the nodes of Gauss-Hermite quadrature of both, each with its weight."""
        for share_node, share_weight in zip(*_quadrature(5), strict=True):
            for kl_node, kl_weight in zip(*_quadrature(3), strict=True):
                share_N = (self.share_N + wider * share_node * self.share_deviation_N).clip(0, 1)
                kl_N = self.kl_N * np.exp(wider * kl_node * self.kl_deviation)
                yield np.stack([share_N, kl_N], axis=1), share_weight * kl_weight


def _quadrature(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights whose weighted mean of a function is its expectation under a standard normal."""
    places, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return places, weights / weights.sum()


def _told(candidates: Sequence[Candidate]) -> _Told:
    """Share of refusals and KL that each candidate would be scored; a trial without scores is not among the K."""
    likelihood_N = np.array([candidate.likelihood for candidate in candidates])
    kl_N = np.array([candidate.kl for candidate in candidates]).clip(min=LEAST_KL)
    known = [at for at, candidate in enumerate(candidates) if candidate.share is not None]
    share_K, scored_K = (
        np.array([getattr(candidates[at], name) for at in known], dtype=float) for name in ("share", "scored_kl")
    )
    near_NK = np.exp(-((likelihood_N[:, None] - likelihood_N[known]) ** 2) / (2 * _WIDTH**2))
    share_N = likelihood_N + near_NK @ (share_K - likelihood_N[known]) / (near_NK.sum(axis=1) + _DOUBT)
    share_N = share_N.clip(0, 1)
    off_N = near_NK @ (share_K - share_N[known]) ** 2
    ratio_K = np.log(scored_K.clip(min=LEAST_KL) / kl_N[known])
    ratio = float(ratio_K.sum()) / (len(known) + _DOUBT)
    ratio_off = float(((ratio_K - ratio) ** 2).sum())
    return _Told(
        share_N,
        kl_N * math.exp(ratio),
        np.sqrt((off_N + _SUPPOSED * _SHARE_DEVIATION**2) / (near_NK.sum(axis=1) + _SUPPOSED)),
        math.sqrt((ratio_off + _SUPPOSED * _KL_DEVIATION**2) / (len(known) + _SUPPOSED)),
    )
