"""Trackers for tests, named by their dotted paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from heretic_ds.search.trials import TrialRecord
from heretic_ds.tracking.base import RunFacts, Tracker, metrics_of


class Recorder(Tracker):
    """Remembers what it was told."""

    told: ClassVar[list[tuple[str, Any]]] = []

    def start(self, facts: RunFacts) -> str:
        self.told.append(("start", facts))
        return facts.run or "the run"

    def trial(self, record: TrialRecord) -> None:
        self.told.append(("trial", (record.index, metrics_of(record))))

    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        self.told.append(("end", (results["selected"], [file.name for file in files])))

    def interrupted(self) -> None:
        self.told.append(("interrupted", None))


class Failing(Recorder):
    """Its disk is full at the third trial."""

    def trial(self, record: TrialRecord) -> None:
        if record.index == 2:
            raise OSError(28, "No space left on device")
        super().trial(record)


class Refusing(Recorder):
    """Its server cannot be reached."""

    def start(self, facts: RunFacts) -> str:
        raise ConnectionError("no route\nto host")
