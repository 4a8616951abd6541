"""Edits that the user names: a trial of an earlier run, or the numbers of ``ablation.*``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from heretic_ds.ablation import Edit, Profile
from heretic_ds.errors import UserError
from heretic_ds.model_source import read_json
from heretic_ds.search.objective import Objective
from heretic_ds.search.trials import COMPLETE, TrialRecord
from heretic_ds.settings import Settings
from heretic_ds.stages.finish import verify
from heretic_ds.stages.opening import RESULTS_NAME, Run, run_dir
from heretic_ds.world import World

log = logging.getLogger(__name__)


def fixed_edit(settings: Settings) -> Edit | None:
    """The edit that ``ablation.*`` gives, or None."""
    given = settings.ablation.profiles
    profiles: dict[str, Profile] = {}
    for component, numbers in (("attention", given.attention), ("mlp", given.mlp)):
        four = (numbers.max_weight, numbers.max_weight_position, numbers.min_weight, numbers.min_weight_distance)
        known = [number for number in four if number is not None]
        if len(known) == len(four):
            profiles[component] = Profile(*known)
    return Edit(settings.ablation.direction_index, profiles) if profiles else None


def named_edit(settings: Settings, world: World) -> tuple[Edit, int | None]:
    """The edit to work with, and the index of its trial where ``export.trial`` names one of the run folder.

    Asked for before anything is loaded or written: it takes a folder's ``results.json`` alone. Raises UserError where
    no edit is named, or the folder has no such trial.
    """
    fixed = fixed_edit(settings)
    if fixed is not None:
        return fixed, None
    trial, folder = settings.export.trial, run_dir(settings)
    if trial is None:
        raise UserError("no edit was named: give export.trial=<index> of an earlier run, or ablation.profiles.*")
    entries = world.decide(lambda: _trials_in(folder))
    if not entries:
        raise UserError(f"export.trial={trial}: {folder} holds no trials; give the run.dir of an earlier search")
    for entry in entries:
        if entry["index"] == trial and entry["state"] == COMPLETE:
            return Edit.from_dict(entry), trial
    raise UserError(
        f"export.trial={trial}: {folder} has no finished trial of that number; "
        f"its trials are 0 to {max(entry['index'] for entry in entries)}"
    )


def _trials_in(folder: Path) -> list[dict[str, Any]]:
    file = folder / RESULTS_NAME
    trials: list[dict[str, Any]] = read_json(file).get("trials", []) if file.is_file() else []
    return trials


def score_fixed_edit(run: Run, objective: Objective) -> None:
    """Score the edit that ``ablation.*`` gives, or the model as it is without one: the one trial of the results."""
    edit = fixed_edit(run.settings)
    started = time.perf_counter()
    scores = verify(run, objective, edit)
    record = TrialRecord(
        index=0,
        pass_=0,
        state=COMPLETE,
        edit=edit or Edit(None, {}),
        refusals=scores.refusals,
        kl=scores.kl,
        scores=scores.scores,
        seconds=time.perf_counter() - started,
    )
    run.results["trials"], run.results["pareto"], run.results["selected"] = [record.to_dict()], [0], 0
    prompts = run.results["prompts"]["target_eval"]
    what = "edited model" if edit else "model as it is"
    log.info("%s: %g of %d target prompts declined, KL %.6g", what, scores.refusals, prompts, scores.kl)
