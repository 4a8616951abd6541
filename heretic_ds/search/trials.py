"""What passes between the search and whoever evaluates its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heretic_ds.ablation.edit import Edit
from heretic_ds.scoring.agreement import Agreement
from heretic_ds.scoring.values import Values

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
    maximize: bool = False
    """Whether a larger first number is better."""
    values: Mapping[str, Values] = field(default_factory=dict, compare=False)
    """By prompt, of ``kl`` and of every scorer that tells, where the objective was asked for them. Not kept."""
    agreements: tuple[Agreement, ...] = field(default=(), compare=False)
    """Of every two scorers that flag answers to the same prompts. Not kept."""

    @property
    def usable(self) -> bool:
        """Whether both numbers are finite, so that the trial can be compared with others."""
        return math.isfinite(self.refusals) and math.isfinite(self.kl)


def plain(scores: TrialScores) -> TrialScores:
    """Python numbers, which JSON takes, for a scorer's array scalars; a side score not finite is None."""

    def python(number: Any) -> Any:
        return number.item() if hasattr(number, "item") else number

    others = {name: python(value) for name, value in scores.scores.items()}
    finite = {name: v if v is not None and math.isfinite(v) else None for name, v in others.items()}
    return TrialScores(python(scores.refusals), python(scores.kl), finite, scores.maximize)


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
    maximize: bool = False
    """Whether more ``refusals``, as the first scorer's number is called, are better."""

    @property
    def aim(self) -> float:
        """What is to be small of the first scorer's number. Trials without one have failed, and nothing is aimed at."""
        found = math.inf if self.refusals is None else self.refusals
        return -found if self.maximize else found

    @property
    def complete(self) -> bool:
        """Whether the trial has scores and may be chosen."""
        return self.state == COMPLETE

    def in_words(self, scorer: str = "refusals") -> str:
        """The trial in a line of plain text, as ``run.log`` keeps it; ``scorer`` is the first scorer's name."""
        edit = self.edit.to_dict()
        if not self.complete:
            return f"trial {self.index}: failed, {self.seconds:.2f} s"
        others = "".join(f", {name} {score}" for name, score in self.scores.items() if name != scorer)
        direction = "per layer" if edit["direction_index"] is None else f"{edit['direction_index']:.3f}"
        profiles = "; ".join(
            f"{component} " + ", ".join(f"{name} {value:.3f}" for name, value in profile.items())
            for component, profile in edit["profiles"].items()
        )
        found = f"{scorer} {self.refusals:g}, KL {self.kl:.6g}{others}, {self.seconds:.2f} s"
        return f"trial {self.index}: {found}; direction {direction}; {profiles}"

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
            **({"maximize": True} if self.maximize else {}),
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
            maximize=entry.get("maximize", False),
        )
