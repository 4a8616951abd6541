"""Edits that the user names: a trial of an earlier run, or the numbers of ``ablation.*``."""

from __future__ import annotations

import logging
import time
from dataclasses import astuple

from heretic_ds.ablation import Edit, Profile
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import reading
from heretic_ds.report.tables import score_in_words, share_in_words
from heretic_ds.run_folder import RESULTS_NAME, read_results
from heretic_ds.search.objective import Objective
from heretic_ds.search.trials import COMPLETE, TrialRecord, TrialScores
from heretic_ds.settings import Settings
from heretic_ds.stages.finish import show_agreement, verify, verify_trial
from heretic_ds.stages.opening import Run, run_dir
from heretic_ds.stages.sharing.packing import how_edited
from heretic_ds.world import World

log = logging.getLogger(__name__)


def fixed_edit(settings: Settings) -> Edit | None:
    """The edit that ``ablation.*`` gives, or None."""
    given = {component: astuple(numbers) for component, numbers in vars(settings.ablation.profiles).items()}
    profiles = {component: Profile(*numbers) for component, numbers in given.items() if None not in numbers}
    return Edit(settings.ablation.direction_index, profiles) if profiles else None


def named_edit(settings: Settings, world: World) -> tuple[Edit, TrialRecord | None]:
    """The edit to work with, and its trial where ``export.trial`` names one of the run folder.

    Asked for before anything is loaded or written: it takes a folder's ``results.json`` alone. Raises UserError where
    no edit is named, or the folder has no such trial.
    """
    fixed = fixed_edit(settings)
    if fixed is not None:
        return fixed, None
    trial, folder = settings.export.trial, run_dir(settings)
    if trial is None:
        raise UserError("no edit was named: give export.trial=<index> of an earlier run, or ablation.profiles.*")
    file = folder / RESULTS_NAME
    entries = world.decide(lambda: (read_results(folder) or {}).get("trials"))
    if not entries:
        raise UserError(f"export.trial={trial}: {folder} holds no trials; give the run.dir of an earlier search")
    with reading(file, "give the run.dir of another search", "holds a trial that is not whole"):
        for entry in entries:
            if entry["index"] == trial and entry["state"] == COMPLETE:
                return Edit.from_dict(entry), TrialRecord.from_dict(entry)
    raise UserError(
        f"export.trial={trial}: {folder} has no finished trial of that number; "
        f"its trials are 0 to {max(entry['index'] for entry in entries)}"
    )


def verify_named(run: Run, objective: Objective, edit: Edit, record: TrialRecord | None) -> None:
    """Score an edit that the user named on really edited weights, which stay edited."""
    refuse_idle(run, edit)
    if record is None:
        scores = verify(run, objective, edit)
        log.info("%s: %s at KL %.3g", how_edited(run), score_in_words(scores.refusals, run.scorer), scores.kl)
    else:
        verify_trial(run, objective, record)
        run.results["trials"] = [record.to_dict()]


def refuse_idle(run: Run, edit: Edit) -> None:
    """Refuse an edit whose profiles reach no layer: nothing would be edited."""
    if not any(edit.strength(writer.component, writer.block) for writer in run.job.anatomy.writers):
        raise UserError(
            "the profiles of ablation.profiles reach no layer of the model, whose layers are "
            f"0 to {run.job.anatomy.n_blocks - 1}; change max_weight_position or min_weight_distance"
        )


def score_fixed_edit(run: Run, objective: Objective) -> None:
    """Score the edit that ``ablation.*`` gives, or the model as it is without one: the one trial of the results."""
    edit = fixed_edit(run.settings)
    if edit is not None:
        refuse_idle(run, edit)
    started = time.perf_counter()
    scores = verify(run, objective, edit)
    note_one_trial(run, edit, scores, time.perf_counter() - started)
    prompts = run.results["prompts"]["target_eval"]
    what = "edited model" if edit else "model as it is"
    log.info("%s: %s, KL %.6g", what, share_in_words(scores.refusals, prompts, run.scorer), scores.kl)
    show_agreement(run)


def note_one_trial(run: Run, edit: Edit | None, scores: TrialScores, seconds: float) -> None:
    """Keep the scores of an edit, or of a model as it is, as the one trial of the results."""
    record = TrialRecord(
        index=0,
        pass_=0,
        state=COMPLETE,
        edit=edit or Edit(None, {}),
        refusals=scores.refusals,
        kl=scores.kl,
        scores=scores.scores,
        seconds=seconds,
        maximize=scores.maximize,
    )
    run.results["trials"], run.results["pareto"], run.results["selected"] = [record.to_dict()], [0], 0
