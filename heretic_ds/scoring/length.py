"""Measures how long answers are: edits that damage a model often show in it."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_ds.scoring.base import Scorer


class LengthScorer(Scorer):
    """Mean number of words per answer. It needs whole answers, so that no row stops early."""

    name = "length"
    combine = "mean"

    def each(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(len(answer.split())) for answer in answers]
