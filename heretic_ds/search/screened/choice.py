"""Which candidates could be on the front: what they would be scored, predicted from what they were screened by.

A candidate has a refusal likelihood s and a KL divergence k, both on a part of the prompts; a trial has in addition its
share r of the original's refusals and its KL divergence, on all of them. The share is predicted as s plus the mean
residual r - s of the trials that are near in s; the KL as k times the trials' mean ratio. What single trials are off by
beside that is expected of edits like theirs too, by a Gaussian process over what edits do. How widely residuals and
ratios scatter says how far off both may be, independently of each other. Chosen is whoever has the largest expected
improvement: of the area that the trials dominate, as a part of what it lacks, once with heights of KL
(:mod:`heretic_ds.search.screened.area`) and once with KL as it is, which the last few refusals decide; the sum of both.
Trials that are not scored yet, or failed, count as what is predicted of them.

N candidates, F of them free, K trials with scores, Q nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heretic_ds.search.screened.area import LEAST_KL, MOST_KL, gains, height
from heretic_ds.search.screened.surrogate import correlation

_WIDTH = 0.12
"""Distance in s at which a trial's residual counts 0.6 of what it does at none."""
_DOUBT = 0.5
"""Trials that a prediction is worth which knows of none: residuals and ratios are drawn towards none that much."""
_SHARE_DEVIATION, _KL_DEVIATION = 0.015, 0.05
"""Scatter of a share, and of a logarithm of KL, before any trial is known. Twice as much did no better on analytic
problems: docs/performance.md."""
_SUPPOSED = 2
"""Trials that those deviations are worth."""
_ALIKE, _NOISE, _LEAST = 0.5, 0.1, 0.02
"""Distance of edits at which what one is off by counts 0.6 for the other; variance of it that edits do not explain, as
a multiple of what they do; and the least part of a variance that stays, whatever is known: what edits do not explain
is not added to it."""
_WIDER = [2.0**doublings for doublings in range(16)]
"""Times the deviations: the first of them is taken with which any candidate is expected to improve something, else the
last."""


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


def pick(candidates: Sequence[Candidate], kl_target: float, features_NF: np.ndarray | None = None) -> int:
    """Place of the candidate that should be scored next, the first where none could improve anything; without features
    no edit is like another. Raises ValueError where all are taken."""
    free_N = np.array([not candidate.taken for candidate in candidates], dtype=bool)
    if not free_N.any():
        raise ValueError("every candidate is a trial already")
    predicted = predict(candidates, features_NF)
    known_N2 = known_scores(candidates, predicted)
    for wider in _WIDER:
        points_QF2 = predicted.at_nodes(wider)[:, free_N]
        filled_QF = _filled(points_QF2.reshape(-1, 2), known_N2[~free_N], kl_target).reshape(len(_WEIGHT_Q), -1)
        expected_F = _WEIGHT_Q @ filled_QF
        if expected_F.max() > 0:
            break
    return int(np.flatnonzero(free_N)[expected_F.argmax()])


def known_scores(candidates: Sequence[Candidate], predicted: Prediction) -> np.ndarray:
    """Share of refusals and KL [N, 2]: what a trial was scored, and what is predicted of others."""
    scores_N2 = np.stack([predicted.share_N, predicted.kl_N], axis=1)
    for at, candidate in enumerate(candidates):
        if candidate.share is not None and candidate.scored_kl is not None:
            scores_N2[at] = candidate.share, candidate.scored_kl
    return scores_N2


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


def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of places, [Q, 2], and their weights: Gauss-Hermite quadrature of two independent standard normals."""
    (first, first_weight), (second, second_weight) = (np.polynomial.hermite_e.hermegauss(count) for count in (5, 3))
    pairs_Q2 = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
    weight_Q = np.outer(first_weight, second_weight).reshape(-1)
    return pairs_Q2, weight_Q / weight_Q.sum()


_NODE_Q2, _WEIGHT_Q = _nodes()


@dataclass(frozen=True)
class Prediction:
    """What candidates would be scored, and how far off that may be."""

    share_N: np.ndarray
    kl_N: np.ndarray
    share_deviation_N: np.ndarray
    kl_deviation_N: np.ndarray
    """Of the logarithm."""

    def at_nodes(self, wider: float) -> np.ndarray:
        """Points of (share, KL), [Q, N, 2], with deviations that are ``wider`` times what they are."""
        share_QN = self.share_N + wider * _NODE_Q2[:, :1] * self.share_deviation_N
        log_QN = np.log(self.kl_N) + wider * _NODE_Q2[:, 1:] * self.kl_deviation_N
        kl_QN = np.exp(log_QN.clip(math.log(LEAST_KL), 1.0))  # e nats are as many as one: nothing counts there
        return np.stack([share_QN.clip(0, 1), kl_QN], axis=-1)


def predict(candidates: Sequence[Candidate], features_NF: np.ndarray | None = None) -> Prediction:
    """Share of refusals and KL that each candidate would be scored, with their deviations: the scatter of
    trials around predictions that know of these trials themselves, less where edits are like those of trials."""
    likelihood_N = np.array([candidate.likelihood for candidate in candidates])
    kl_N = np.array([candidate.kl for candidate in candidates]).clip(min=LEAST_KL)
    known = [at for at, candidate in enumerate(candidates) if candidate.share is not None]
    share_K, scored_K = (
        np.array([getattr(candidates[at], name) for at in known], dtype=float) for name in ("share", "scored_kl")
    )
    near_NK = np.exp(-((likelihood_N[:, None] - likelihood_N[known]) ** 2) / (2 * _WIDTH**2))
    near_N = near_NK.sum(axis=1)
    share_N = (likelihood_N + near_NK @ (share_K - likelihood_N[known]) / (near_N + _DOUBT)).clip(0, 1)
    residual_K = share_K - share_N[known]
    share_variance_N = (near_NK @ residual_K**2 + _SUPPOSED * _SHARE_DEVIATION**2) / (near_N + _SUPPOSED)
    ratio_K = np.log(scored_K.clip(min=LEAST_KL) / kl_N[known])
    ratio = float(ratio_K.sum()) / (len(known) + _DOUBT)
    kl_variance = (float(((ratio_K - ratio) ** 2).sum()) + _SUPPOSED * _KL_DEVIATION**2) / (len(known) + _SUPPOSED)
    log_N, unexplained_N = np.log(kl_N) + ratio, np.ones(len(candidates))
    if features_NF is not None and known:
        alike_NK = correlation(features_NF, features_NF[known], _ALIKE)
        weights_NK = alike_NK @ np.linalg.inv(alike_NK[known] + _NOISE * np.eye(len(known)))
        share_N = (share_N + weights_NK @ residual_K).clip(0, 1)
        log_N = log_N + weights_NK @ (ratio_K - ratio)
        unexplained_N = (1 - (weights_NK * alike_NK).sum(axis=1)).clip(min=_LEAST)
    return Prediction(
        share_N, np.exp(log_N), np.sqrt(share_variance_N * unexplained_N), np.sqrt(kl_variance * unexplained_N)
    )
