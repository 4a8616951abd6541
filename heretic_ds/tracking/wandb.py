"""Weights & Biases; ``WANDB_API_KEY``, ``WANDB_ENTITY``, ``WANDB_MODE`` mean what they always mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from heretic_ds.tracking.base import RunFacts, Tracker, metrics_of, outcome_of

if TYPE_CHECKING:
    from heretic_ds.search.trials import TrialRecord


class WeightsAndBiases(Tracker):
    """Settings as the run's configuration, every trial's numbers, whose step is its index, results as its summary."""

    package, extra = "wandb", "wandb"

    def start(self, facts: RunFacts) -> str:
        import wandb

        facts.folder.mkdir(parents=True, exist_ok=True)
        identity = facts.run or uuid4().hex[:12]
        self._run = wandb.init(
            project=self.settings.project,
            name=facts.model,
            id=identity,
            resume="allow",
            dir=str(facts.folder),
            config={**facts.parameters, "command": facts.command},
            settings=wandb.Settings(silent=True, console="off"),
        )
        return identity

    def trial(self, record: TrialRecord) -> None:
        self._run.log(metrics_of(record), step=record.index)

    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        self._run.summary.update(outcome_of(results))
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now")
        self._run.finish()

    def interrupted(self) -> None:
        self._run.finish(exit_code=1)
