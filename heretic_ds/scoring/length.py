"""Measures how long answers are: edits that damage a model often show in it."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_ds.scoring.base import Scorer


class LengthScorer(Scorer):
    """Mean number of words per answer. It needs whole answers, so that no row stops early."""

    name = "length"

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
        return sum(len(answer.split()) for answer in answers) / max(len(answers), 1)
