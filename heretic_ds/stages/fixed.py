"""Edits that the user names: a trial of an earlier run, or the numbers of ``ablation.*``."""

from __future__ import annotations

import logging
import time

from heretic_ds.ablation import Edit
from heretic_ds.errors import UserError
from heretic_ds.search.objective import Objective
from heretic_ds.search.trials import COMPLETE, TrialRecord
from heretic_ds.stages.finish import verify
from heretic_ds.stages.opening import Run

log = logging.getLogger(__name__)


def named_edit(run: Run) -> tuple[Edit, int | None]:
    """The edit to work with, and the index of its trial where ``export.trial`` names one of this run folder."""
    fixed, trial = run.job.fixed_edit(), run.settings.export.trial
    if fixed is not None:
        return fixed, None
    if trial is None:
        raise UserError("no edit was named: give export.trial=<index> of an earlier run, or ablation.profiles.*")
    entries = run.world.decide(lambda: ((run.folder and run.folder.load_results()) or {}).get("trials", []))
    if not entries:
        raise UserError(f"export.trial={trial}: {run.path} holds no trials; give the run.dir of an earlier search")
    for entry in entries:
        if entry["index"] == trial and entry["state"] == COMPLETE:
            return Edit.from_dict(entry), trial
    raise UserError(
        f"export.trial={trial}: {run.path} has no finished trial of that number; "
        f"its trials are 0 to {max(entry['index'] for entry in entries)}"
    )


def score_fixed_edit(run: Run, objective: Objective) -> None:
    """Score the edit that ``ablation.*`` gives, or the model as it is without one: the one trial of the results."""
    edit = run.job.fixed_edit()
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
