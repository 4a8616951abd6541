"""The search stage."""

from __future__ import annotations

import logging

from heretic_ds.report import SearchProgress
from heretic_ds.search.loop import run_search
from heretic_ds.search.objective import Objective
from heretic_ds.search.study import Search
from heretic_ds.search.trials import TrialRecord
from heretic_ds.stages.opening import Run

log = logging.getLogger(__name__)


def open_search(run: Run, objective: Objective) -> Search:
    """The study of this run folder, with the trials it holds already."""
    search = Search(
        run.folder.journal,
        run.job.anatomy.n_blocks,
        run.settings.search,
        baseline_refusals=objective.original.refusals,
    )
    run.results["trials"] = [record.to_dict() for record in search.records]
    if search.records:
        log.info("%d of %d trials are done already", len(search.records), search.trials)
    return search


def continue_search(run: Run, search: Search, objective: Objective) -> None:
    """Evaluate trials until the study is complete or the user stops it; trials are kept as they finish."""
    prompts = run.results["prompts"]["target_eval"]
    with (
        run.timed("search"),
        SearchProgress(run.console, search.trials, len(search.records), prompts) as progress,
    ):

        def on_trial(record: TrialRecord) -> None:
            progress.update(record)
            run.results["trials"].append(record.to_dict())
            run.save()

        complete = run_search(search, objective, on_trial)
    if not complete:
        log.warning("the search was stopped after %d of %d trials", len(search.records), search.trials)


def search_edits(run: Run, objective: Objective) -> Search:
    """Search, from wherever an earlier run of the same command was ended."""
    search = open_search(run, objective)
    continue_search(run, search, objective)
    return search
