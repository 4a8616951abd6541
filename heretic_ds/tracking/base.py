"""What follows a search: the one interface that trackers of experiments are called through, on rank 0 alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord
    from heretic_ds.settings.tracking import TrackingSettings


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run before its first trial."""

    model: str
    """The model's name."""
    folder: Path
    """Where a tracker that writes files keeps them; it makes the folder."""
    parameters: Mapping[str, str | int | float | bool]
    """Settings on which scores depend, by key, and what they mean for the machine."""
    command: str
    """The command line, without secrets."""
    run: str | None = None
    """What :meth:`Tracker.start` returned for an earlier part of this search; None where there was none."""
    told: int = 0
    """Trials that it was told of then: the next one has this index."""


class Tracker(ABC):
    """Tells one program that records experiments about a search. Anything it raises is a warning once trials come.

    A class of your own is named by its dotted path in ``tracking.name``.
    """

    package: ClassVar[str | None] = None
    """Module that has to be there."""
    extra: ClassVar[str | None] = None
    """The extra of this package that brings it."""

    def __init__(self, settings: TrackingSettings) -> None:
        self.settings = settings

    @abstractmethod
    def start(self, facts: RunFacts) -> str:
        """Begin a tracked run, or go on with the one of ``facts.run``. Returns what it is known by."""

    @abstractmethod
    def trial(self, record: TrialRecord) -> None:
        """Record a finished trial; its index is the step."""

    @abstractmethod
    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Record the outcome, ``results.json`` as it stands, and keep those files that the program can keep."""

    def interrupted(self) -> None:  # noqa: B027 - few programs want to know
        """The command ended without results: an error, or Ctrl-C twice. The same command goes on later."""


def metrics_of(record: TrialRecord) -> dict[str, float]:
    """A trial's numbers by name: scores, seconds, and the edit's own."""
    edit = record.edit.to_dict()
    found: dict[str, Any] = {"refusals": record.refusals, "kl": record.kl, "seconds": record.seconds}
    found |= {f"scores/{name}": score for name, score in record.scores.items()}
    found["edit/direction_index"] = edit["direction_index"]
    for component, profile in edit["profiles"].items():
        found |= {f"edit/{component}/{name}": value for name, value in profile.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def outcome_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a finished search by name: of the original, of the verified edit, and the trial chosen."""
    verified, original = results.get("verified") or {}, results.get("baseline") or {}
    found = {
        "original/refusals": original.get("refusals"),
        "verified/refusals": verified.get("refusals"),
        "verified/kl": verified.get("kl"),
        "selected": results.get("selected"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}
