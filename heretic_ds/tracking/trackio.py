"""Trackio: a local dashboard, or a Space of the Hugging Face hub (``TRACKIO_SPACE_ID``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from heretic_ds.tracking.base import RunFacts, Tracker, metrics_of, outcome_of

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord


class Trackio(Tracker):
    """Every trial's numbers, whose step is its index: ``trackio show --project <project>``."""

    package, extra = "trackio", "trackio"

    def start(self, facts: RunFacts) -> str:
        import trackio

        name = facts.run or f"{facts.model.replace('/', '-')}-{uuid4().hex[:8]}"
        config = {**facts.parameters, "command": facts.command}
        self._run = trackio.init(project=self.settings.project, name=name, resume="allow", config=config)
        self._steps = facts.told
        return name

    def trial(self, record: TrialRecord) -> None:
        self._run.log(metrics_of(record), step=record.index)
        self._steps = record.index + 1

    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._run.log(outcome_of(results), step=self._steps)
        self._run.finish()

    def interrupted(self) -> None:
        self._run.finish()
