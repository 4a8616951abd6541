"""Scores by prompt: what intervals around a score are drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heretic_ds.ablation import Edit
    from heretic_ds.scoring.base import DistributionScorer, Scorer


def _sum(values: Sequence[float]) -> float:
    """Whole numbers, as a count is made of, have a whole sum."""
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(value) for value in values]))


COMBINE: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": _sum,
    "mean": _mean,
    "geometric_mean": _geometric_mean,
}
"""How a score comes of a number for every prompt: their sum (a count), their mean, or the exponential of the mean of
their logarithms (perplexities)."""


def combined(values: Sequence[float], combine: str | None) -> float:
    """The score that a number for every prompt makes. Raises ValueError for no way of :data:`COMBINE`."""
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}; it has to be one of {', '.join(COMBINE)}")
    return COMBINE[combine](values)


@dataclass(frozen=True)
class Values:
    """What one scorer gives one edit, or the original, prompt by prompt."""

    each: tuple[float, ...]
    """A number for every prompt, in their order. Of the original and of edits they belong to the same prompts."""
    combine: str
    """How the score comes of them, one of :data:`COMBINE`."""

    @property
    def score(self) -> float:
        """The score of all prompts; of a list with repeats, as a bootstrap draws it, see :func:`combined`."""
        return combined(self.each, self.combine)


def score_and_values(
    scorer: Scorer, prompts: Sequence[str], answers: Sequence[str], alone: bool = False
) -> tuple[float, Values | None]:
    """The score of the answers, and what it is made of.

    Of a class that gives the score alone that is not known. With ``alone`` it is tried out: each answer is scored by
    itself, and if neither the sum nor the mean of that is the score of all, there are no values.
    """
    if scorer.combine is not None and _tells(scorer, "score"):
        values = Values(tuple(scorer.each(prompts, answers)), scorer.combine)
        return values.score, values
    score = scorer.score(prompts, answers)
    if not alone:
        return score, None
    each = tuple(float(scorer.score([one], [other])) for one, other in zip(prompts, answers, strict=True))
    near = partial(math.isclose, float(score), rel_tol=1e-9, abs_tol=1e-12)
    how = next((how for how in ("sum", "mean") if near(combined(each, how))), None)
    return score, None if how is None else Values(each, how)


def values_of(scorer: Scorer, prompts: Sequence[str], answers: Sequence[str]) -> Values | None:
    """The numbers of each answer, see :func:`score_and_values`; None where they cannot be told."""
    return score_and_values(scorer, prompts, answers, alone=True)[1]


def values_of_edits(scorer: DistributionScorer, edits: Sequence[Edit | None]) -> list[Values] | None:
    """The numbers of each prompt under each edit; None for a class that gives the score alone."""
    how = scorer.combine if _tells(scorer, "of") else None
    return None if how is None else [Values(tuple(map(float, values)), how) for values in scorer.each(edits)]


def _tells(scorer: object, whole: str) -> bool:
    """Whether what a scorer gives by prompt is its own: no class that it derives from, of which it has overridden the
    method that gives the ``whole`` score."""
    each, other = (next(kind for kind in type(scorer).__mro__ if name in vars(kind)) for name in ("each", whole))
    return issubclass(each, other)
