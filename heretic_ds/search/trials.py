"""What passes between the search and whoever evaluates its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heretic_ds.ablation.edit import Edit

COMPLETE = "complete"
FAILED = "failed"


@dataclass(frozen=True)
class Ask:
    """One edit to evaluate."""

    index: int
    """Number of the trial in the study, from 0."""
    edit: Edit
    pass_: int
    """Number of the pass the trial belongs to: trials asked for together share it."""


@dataclass(frozen=True)
class TrialScores:
    """What evaluating one edit gave."""

    refusals: float
    """The objective scorer's count on the target eval prompts."""
    kl: float
    """Mean first-token KL divergence from the original model, in nats."""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """Every scorer's number, by name; None where it is not finite."""

    @property
    def usable(self) -> bool:
        """Whether both numbers are finite, so that the trial can be compared with others."""
        return math.isfinite(self.refusals) and math.isfinite(self.kl)


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial: one entry of ``trials`` in ``results.json``."""

    index: int
    pass_: int
    state: str
    """``complete``, or ``failed`` where the evaluation gave no finite scores."""
    edit: Edit
    refusals: float | None
    kl: float | None
    scores: Mapping[str, float | None]
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether the trial has scores and may be chosen."""
        return self.state == COMPLETE

    def to_dict(self) -> dict[str, Any]:
        """The entry as ``results.json`` keeps it, with the edit's numbers in place."""
        return {
            "index": self.index,
            "pass": self.pass_,
            "state": self.state,
            **self.edit.to_dict(),
            "refusals": self.refusals,
            "kl": self.kl,
            "scores": dict(self.scores),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TrialRecord:
        """The inverse of :meth:`to_dict`, for trials of an earlier run."""
        return cls(
            index=entry["index"],
            pass_=entry["pass"],
            state=entry["state"],
            edit=Edit.from_dict(entry),
            refusals=entry["refusals"],
            kl=entry["kl"],
            scores=dict(entry["scores"]),
            seconds=entry["seconds"],
        )
