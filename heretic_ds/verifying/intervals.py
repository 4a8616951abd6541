"""Intervals around scores: percentile bootstrap over prompts.

Prompts are a sample of those that one means; another sample would give another score. The bootstrap draws samples of as
many prompts, with replacement, from those that there are, and an interval of 95 % holds the middle 95 % of their scores
(Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3). Both models are scored on the same drawn
prompts, so that the interval of a change is that of a paired comparison.

Where a yes or no is the same for nearly every prompt, samples are nearly alike and would promise certainty. So each end
of a count's interval is at least as far out as that of the exact binomial one (Clopper and Pearson 1934): 0 of n may be
up to 1 - 0.025^(1/n). Of the change of a count that holds where it is the same for every prompt.

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
        found = self._interval(values.score, self._scores(values), None)
        if values.combine != "sum" or any(value not in (0, 1) for value in values.each):
            return found
        low, high = _exact_ends(round(values.score), len(values.each))
        return Scored(found.score, min(found.low, low), max(found.high, high))

    def change(self, before: Values, after: Values) -> Scored:
        """How much the second score is above the first one, both on the same prompts, and the interval of that."""
        if len(before.each) != len(after.each) or before.combine != after.combine:
            raise ValueError("two scores of different prompts, or of different kinds, cannot be compared")
        each = [b - a for a, b in zip(before.each, after.each, strict=True)]
        ends = _ends_of_one_change(each) if after.combine == "sum" else None
        with np.errstate(invalid="ignore"):  # the difference of two scores without bounds is no number
            samples_R = self._scores(after) - self._scores(before)
        return self._interval(after.score - before.score, samples_R, ends)

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
        with np.errstate(invalid="ignore"):
            low, high = ends or (float(end) for end in np.quantile(samples_R, [_TAIL, 1 - _TAIL]))
        return Scored(score, low, high)


def _exact_ends(k: int, n: int) -> tuple[float, float]:
    """The exact interval (Clopper and Pearson) of a count of ``k`` of ``n``, in counts."""
    return n - _most(n - k, n), _most(k, n)


def _most(k: int, n: int) -> float:
    """The largest n·p under which ``k`` or fewer of ``n`` are as likely as the tail."""
    if k == n:
        return float(n)
    ways = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]  # log(n over i)
    low, high = k / n, 1.0
    for _ in range(50):  # bisection: the probability falls with p
        p = (low + high) / 2
        yes, no = math.log(p), math.log1p(-p)
        likely = math.fsum(math.exp(way + i * yes + (n - i) * no) for i, way in enumerate(ways))
        low, high = (p, high) if likely > _TAIL else (low, p)
    return n * (low + high) / 2


def _ends_of_one_change(each: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the change of a count where every prompt gives the same: -1, 0 or 1. None where they do not."""
    first, n = each[0] if each else math.nan, len(each)
    if first not in (-1.0, 0.0, 1.0) or any(value != first for value in each):
        return None
    others = n * (1 - _TAIL ** (1 / n))  # prompts of n that might give something else
    if first == 0.0:
        return -others, others
    return (-n, others - n) if first < 0 else (n - others, n)
