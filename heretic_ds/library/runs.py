"""What a run of the command has left in its folder, for programs: ``heretic_ds.load_run("runs/x").best``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import load_file

from heretic_ds.ablation import Ablation
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of, read_text, reading
from heretic_ds.library.models import Directions, ModelEdit
from heretic_ds.run_folder import read_results
from heretic_ds.search.pareto import candidates, pareto_front
from heretic_ds.search.trials import TrialRecord


@dataclass(frozen=True)
class FinishedRun:
    """A run folder."""

    folder: Path
    results: dict[str, Any] = field(repr=False)
    """``results.json``."""
    settings: dict[str, Any] = field(repr=False)
    """``config.yaml``, the composed configuration."""
    directions: Directions = field(repr=False)
    trials: Sequence[TrialRecord] = field(repr=False)
    """Of the search, by index."""

    @property
    def model(self) -> str:
        """Hub id or folder of the model, as the run was given it."""
        return str(self.results["model"])

    @property
    def front(self) -> list[TrialRecord]:
        """Trials that no other beats, from the fewest refusals to the lowest KL."""
        return [self._trial(index) for index in pareto_front(self.trials)]

    @property
    def best_trial(self) -> TrialRecord:
        """The trial that the run selected; before it has, the one that it would: the fewest refusals within
        ``export.max_kl``. Raises UserError where there is none."""
        if self.results.get("selected") is not None:
            return self._trial(self.results["selected"])
        max_kl = self.settings["export"]["max_kl"]
        chosen = candidates(self.trials, max_kl)
        if not chosen:
            raise UserError(f"{self.folder} has no finished trial within export.max_kl={max_kl}; name one by edit()")
        return chosen[0]

    @property
    def best(self) -> ModelEdit:
        """The edit of :attr:`best_trial`."""
        return self.edit(self.best_trial.index)

    def edit(self, index: int) -> ModelEdit:
        """The edit of a trial. Raises UserError where there is none of that number."""
        ablation = self.settings["ablation"]
        form = Ablation(self.directions.directions_LD, ablation["row_norm"], ablation["through_norm"])
        return ModelEdit(form, self._trial(index).edit)

    def _trial(self, index: int) -> TrialRecord:
        found = next((trial for trial in self.trials if trial.index == index), None)
        if found is None:
            raise UserError(f"{self.folder} has no trial {index}; its {len(self.trials)} trials count from 0")
        return found


def load_run(folder: str | Path) -> FinishedRun:
    """Read a run folder. Raises UserError where it is none, or has no directions or trials yet."""
    folder = path_of(str(folder), "folder")
    results, config, directions = (folder / name for name in ("results.json", "config.yaml", "directions.safetensors"))
    for file in (results, config, directions):
        if not file.is_file():
            raise UserError(f"{folder} holds no {file.name}; give the folder of a run that has begun to search")
    again = "run the same command again"
    with reading(directions, again, "is damaged"):
        tensors = load_file(directions)
        found = Directions(*(tensors[name] for name in ("directions", "target_mean", "baseline_mean")))
    content = read_results(folder) or {}
    with reading(config, again):
        settings: Any = OmegaConf.to_container(OmegaConf.create(read_text(config)))
    with reading(results, again):
        trials = [TrialRecord.from_dict(entry) for entry in content["trials"]]
    return FinishedRun(folder, content, settings, found, trials)
