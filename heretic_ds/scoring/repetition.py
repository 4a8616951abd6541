"""Measures how much answers repeat themselves: edits that damage a model make it go round in circles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from heretic_ds.scoring.base import Scorer
from heretic_ds.settings import within

_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|"
    "[^\\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]+"
)
"""What white space parts, and every character by itself of scripts that put none between words (Thai, Lao, Burmese,
Khmer, Japanese, Chinese)."""


class Repetition(Scorer):
    """Mean share of an answer's n-grams of words that stood in it before: 1 - different n-grams / n-grams.

    That is seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), on words in lower case. Of an answer with fewer than n
    words it is 0. It needs whole answers, so that no row stops early.
    """

    name = "repetition"
    combine = "mean"

    @dataclass
    class Options(Scorer.Options):
        """Which sequences are looked for."""

        n: int = within(4, ge=1)
        """Words of a sequence."""

    def each(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The share of each answer, in [0, 1)."""
        return [repeated(answer, self.options.n) for answer in answers]


def repeated(text: str, n: int) -> float:
    """Share of the n-grams of a text's words that stood in it before."""
    return repeated_runs(_WORD.findall(text.lower()), n)


def repeated_runs(items: Sequence[object], n: int) -> float:
    """Share of the runs of ``n`` neighbouring items that occurred before; 0 for fewer items."""
    grams = [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
