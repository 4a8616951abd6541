"""How far two scorers agree on which answers show something: markers and a classifier, say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """Answers to the same prompts, counted by what two scorers call them."""

    first: str
    """Name of the one scorer."""
    second: str
    """Name of the other."""
    both: int
    """Answers that both flag."""
    first_only: int
    second_only: int
    neither: int

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa (1960): (p - e) / (1 - e), where p is the share of answers on which the two agree, and e what
        it would be if each flagged as many at random. 1: always, 0: as by chance. None where that says nothing: both
        flag all answers, or none."""
        count = self.both + self.first_only + self.second_only + self.neither
        if count == 0:
            return None
        one, other = (self.both + self.first_only) / count, (self.both + self.second_only) / count
        agreed, expected = (self.both + self.neither) / count, one * other + (1 - one) * (1 - other)
        return None if expected == 1 else (agreed - expected) / (1 - expected)

    def to_dict(self) -> dict[str, Any]:
        """An entry of ``agreement`` in ``results.json``."""
        return {**asdict(self), "kappa": self.kappa}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Agreement:
        """The inverse of :meth:`to_dict`."""
        return cls(**{name: entry[name] for name in cls.__dataclass_fields__})


def agreements(flags: Mapping[str, Sequence[float]]) -> tuple[Agreement, ...]:
    """Of every two scorers: ``flags`` are what each gives every answer, 1 where it flags it and 0 where it does not."""
    found = []
    for first, second in combinations(flags, 2):
        pairs = [(bool(one), bool(other)) for one, other in zip(flags[first], flags[second], strict=True)]
        counts = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
        found.append(Agreement(first, second, *counts))
    return tuple(found)
