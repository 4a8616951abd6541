"""Intervals around scores: percentile bootstrap over prompts.

Prompts are a sample of those that one means; another sample would give another score. The bootstrap draws samples of as
many prompts, with replacement, from those that there are, and an interval of 95 % holds the middle 95 % of their scores
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3). Both models are scored on the same drawn
prompts, so that the interval of a change is that of a paired comparison.

Where a yes or no is the same for every prompt, all samples are alike and would promise certainty. There one end is that
of the exact binomial interval (Clopper and Pearson 1934): 0 of n may be up to 1 - 0.025^(1/n).

Shapes: N prompts, R samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heretic_ds.scoring.values import Values

CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2
_AT_ONCE = 1_000_000
"""Numbers of drawn prompts that are in memory at one time."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """A score with the ends of its interval."""

    score: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """As ``results.json`` keeps it: None for what is not finite."""
        numbers = {"score": self.score, "low": self.low, "high": self.high}
        return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}


@dataclass(frozen=True)
class Bootstrap:
    """Samples of prompts, the same for scores of equally many prompts."""

    resamples: int = 2000
    seed: int = 0

    def of(self, values: Values) -> Scored:
        """A score and its interval. Raises ValueError without prompts."""
        ends = _ends_of_one_answer(values.each, 0.0) if values.combine == "sum" else None
        return self._interval(values.score, self._scores(values), ends)

    def change(self, before: Values, after: Values) -> Scored:
        """How much the second score is above the first one, both on the same prompts, and the interval of that."""
        if len(before.each) != len(after.each) or before.combine != after.combine:
            raise ValueError("two scores of different prompts, or of different kinds, cannot be compared")
        each = [b - a for a, b in zip(before.each, after.each, strict=True)]
        ends = _ends_of_one_answer(each, -1.0) if after.combine == "sum" else None
        return self._interval(after.score - before.score, self._scores(after) - self._scores(before), ends)

    def _scores(self, values: Values) -> Floats:
        """The scores [R] of all samples."""
        each_N = np.asarray(values.each, dtype=np.float64)
        n = len(each_N)
        if n == 0:
            raise ValueError("a score of no prompts has no interval")
        if values.combine == "geometric_mean":
            each_N = np.log(each_N)
        draw = np.random.default_rng(self.seed)
        parts, left = [], self.resamples
        while left:
            count = min(left, max(1, _AT_ONCE // n))
            parts.append(each_N[draw.integers(n, size=(count, n))].mean(axis=1))
            left -= count
        mean_R: Floats = np.concatenate(parts)
        if values.combine == "geometric_mean":
            return np.exp(mean_R)
        return mean_R * n if values.combine == "sum" else mean_R

    @staticmethod
    def _interval(score: float, samples_R: Floats, ends: tuple[float, float] | None) -> Scored:
        low, high = ends or (float(end) for end in np.quantile(samples_R, [_TAIL, 1 - _TAIL]))
        return Scored(score, low, high)


def _ends_of_one_answer(each: Sequence[float], lowest: float) -> tuple[float, float] | None:
    """The interval of a count, or of the change of one, where every prompt gives the same: -1, 0 or 1, of which no
    prompt can give less than ``lowest``. None where they do not."""
    first, n = each[0] if each else math.nan, len(each)
    if first not in (-1.0, 0.0, 1.0) or any(value != first for value in each):
        return None
    others = n * (1 - _TAIL ** (1 / n))  # prompts of n that might give something else
    if first == 0.0:
        return lowest * others, others
    return (-n, others - n) if first < 0 else (n - others, n)
