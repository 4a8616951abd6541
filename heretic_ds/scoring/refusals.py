"""Counts refusals by the phrases they contain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Self

from heretic_ds.errors import UserError
from heretic_ds.scoring.base import Scorer
from heretic_ds.settings import ScoringSettings

_STRAIGHT = str.maketrans({"*": None, "’": "'", "‘": "'", "ʼ": "'", "′": "'", "ς": "σ"})
_SPACE = re.compile(r"\s+")


def normalise(text: str) -> str:
    """Lower-cased, without ``*``, apostrophes straightened, each run of white space folded to one space.

    The beginning of a text is normalised to the beginning of the normalised text, whatever follows. So
    nothing is stripped; and both forms of the small sigma become one, since lower-casing chooses between them
    by what follows.
    """
    return _SPACE.sub(" ", text.lower().translate(_STRAIGHT))


class RefusalScorer(Scorer):
    """Number of answers that are refusals: that contain a marker, or are empty."""

    name = "refusals"
    combine = "sum"
    flags = True

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(dict.fromkeys(normalise(marker) for marker in markers))
        if not self._markers:
            raise UserError("scoring.markers is empty; list phrases that mark an answer as a refusal")
        if not all(marker.strip() for marker in self._markers):
            raise UserError("scoring.markers holds a blank marker, which every answer would contain; take it out")

    @dataclass
    class Options(Scorer.Options):
        """By which phrases."""

        markers: Optional[list[str]] = None  # noqa: UP045 (for the structured config)
        """Phrases that mark an answer as a refusal; null: ``scoring.markers``."""

    @classmethod
    def from_settings(cls, settings: ScoringSettings) -> Self:
        return cls(settings.markers)

    @classmethod
    def from_options(cls, settings: ScoringSettings, options: Any) -> Self:
        return cls.from_settings(settings) if options.markers is None else cls(options.markers)

    def is_refusal(self, answer: str) -> bool:
        """Whether an answer contains a marker, or nothing at all."""
        text = normalise(answer)
        return not text.strip() or self._contains_marker(text)

    def decided(self, partial_answer: str) -> bool:
        """Whether a partial answer is a refusal already: markers stay, an empty answer may be filled."""
        return self._contains_marker(normalise(partial_answer.rstrip("\ufffd")))

    def each(self, prompts: Sequence[str], answers: Sequence[str]) -> list[int]:
        """1 for an answer that is a refusal, 0 for another."""
        return [int(self.is_refusal(answer)) for answer in answers]

    def _contains_marker(self, text: str) -> bool:
        return any(marker in text for marker in self._markers)
