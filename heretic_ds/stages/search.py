"""The search stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from heretic_ds.errors import UserError
from heretic_ds.report.progress import SearchProgress
from heretic_ds.run_folder import read_fingerprint
from heretic_ds.scoring import make_scorers, may_be_screened
from heretic_ds.search.loop import run_search
from heretic_ds.search.objective import Objective
from heretic_ds.search.screened.candidates import Candidates
from heretic_ds.search.screened.screening import Screening, screened_rows
from heretic_ds.search.study import Search, refuse_nothing
from heretic_ds.search.trials import TrialRecord
from heretic_ds.settings import AUTO, Settings
from heretic_ds.settings.search import DIRECT, SCREENED
from heretic_ds.stages.opening import Run, run_dir
from heretic_ds.stages.tracking import Following, about
from heretic_ds.world import World

log = logging.getLogger(__name__)

EVALUATED = ("target.eval", "baseline.eval")
_SEARCHED = ("abliterate", "evaluate", "export", "chat", "geometry")
"""Tasks that open the folder of a run."""
MOST_TRIALS = 4
"""Most trials that ``search.trials_per_pass=auto`` takes together: trials of one pass do not learn from each other.
With 8 of them fronts were up to 5 % smaller on one objective, with 4 not significantly so
(``benchmarks/search_quality.py``)."""
MOST_CANDIDATES = 5
"""Most candidates that are screened together, unless more than that are screened for each trial."""


def settle_strategy(settings: Settings, world: World) -> Settings:
    """The settings with a strategy where it was left open: that of the run folder, in a new one the faster one where
    the first scorer lets edits be compared before they are scored. Raises UserError."""
    if settings.search.strategy != AUTO or settings.task.name not in _SEARCHED:
        return settings
    strategy = world.decide(lambda: _strategy(settings))
    return replace(settings, search=replace(settings.search, strategy=strategy))


def _strategy(settings: Settings) -> str:
    known = read_fingerprint(run_dir(settings))
    if known is not None:
        return SCREENED if known.get("search.strategy") == SCREENED else DIRECT
    if settings.task.name == "evaluate":  # whose folder no search is in
        return DIRECT
    return SCREENED if may_be_screened(make_scorers(settings.scoring)[0]) else DIRECT


def trials_per_pass(run: Run) -> int:
    """How many trials are asked for and evaluated together; found once for a run folder where that is left open."""
    given, most = str(run.settings.search.trials_per_pass), max(1, run.engine.max_edits_per_pass)
    if given != AUTO and int(given) > most:
        log.info("search.trials_per_pass=%s, but this placement edits for %d trial(s) at a time", given, most)
    return _per_pass(run, "trials_per_pass", _trials_that_fill_batches)


def _per_pass(run: Run, name: str, find: Callable[[Run], int]) -> int:
    """As many as ``search.trials_per_pass`` names; where that is left open, what is found once for a run folder, which
    remembers it by ``name``. Never more than one pass can edit for."""
    given, most = str(run.settings.search.trials_per_pass), max(1, run.engine.max_edits_per_pass)
    if given != AUTO:
        return min(int(given), most)
    count = run.measured.get(name)
    if count is None:
        count = run.world.decide(lambda: find(run))
        run.remember(**{name: count})
    return min(count, most)


def _trials_that_fill_batches(run: Run) -> int:
    """On a CPU one for each replica, whose shares of the prompts would be small ones otherwise: every row costs its own
    time there, but every pass something too."""
    replicas = run.world.size // run.engine.degree
    if run.job.opened.device.type == "cpu":
        return min(MOST_TRIALS, replicas)
    rows, prompts = run.engine.batch_sizes.get("generate", 1), len(run.job.texts["target.eval"])
    return max(1, min(MOST_TRIALS, math.ceil(rows * replicas / prompts)))


def candidates_per_pass(run: Run) -> int:
    """How many candidates are screened together: as many as ``search.trials_per_pass`` names; found once for a run
    folder where that is left open, on a CPU one for each replica, elsewhere as many as fill a batch."""
    return _per_pass(run, "candidates_per_pass", _candidates_that_fill_batches)


def _candidates_that_fill_batches(run: Run) -> int:
    replicas, most = run.world.size // run.engine.degree, max(MOST_CANDIDATES, run.settings.search.candidates)
    if run.job.opened.device.type == "cpu":
        return min(most, replicas)
    rows = run.engine.batch_sizes.get("kl", 1) * replicas
    return max(1, min(most, math.ceil(rows / screened_rows(*(len(run.job.texts[name]) for name in EVALUATED)))))


def _screening(run: Run, objective: Objective) -> Screening:
    """What candidates are compared by: the target prompts that the original declines, and the baseline prompts."""
    prompts, answers = objective.declined()
    if not prompts:
        refuse_nothing(objective.original.refusals)
    if not any(answers):
        raise UserError(
            "edits cannot be compared before they are scored (search.strategy=screened), since all answers that the "
            "original declines with are empty; set search.strategy=direct"
        )
    return Screening(run.engine, prompts, answers, run.job.prompts("baseline.eval").rows)


def open_search(run: Run, objective: Objective) -> Search | None:
    """The study of this run folder, on the rank that decides; its finished trials are known to every rank."""
    studies: list[Search] = []
    together, settings = trials_per_pass(run), run.settings.search
    screened = settings.strategy == SCREENED
    if screened:
        log.info("edits are compared before the best are scored (search.strategy=screened)")
        objective.screening = _screening(run, objective)
    screens = candidates_per_pass(run) if screened else 0

    def open_study() -> list[TrialRecord]:
        if run.folder is None:
            raise RuntimeError("the rank that decides holds the run folder")
        layers, refusals, file = run.job.anatomy.n_blocks, objective.original.refusals, run.folder.candidates
        propose = Candidates(file, layers, settings, refusals, screens, about(run)) if screened else None
        studies.append(Search(run.folder.journal, layers, settings, refusals, together, about(run), propose))
        return studies[0].records

    run.records = run.world.decide(open_study)
    done, wanted = len(run.records), run.settings.search.trials
    if done > wanted:
        log.info("%d trials are done already; search.trials=%d asks for no more", done, wanted)
    elif done:
        log.info("%d of %d trials are done already", done, wanted)
    return studies[0] if studies else None


def continue_search(run: Run, search: Search | None, objective: Objective) -> None:
    """Evaluate trials until the study is complete or the user stops it; each is kept as it finishes."""
    trials = run.world.decide(lambda: search.trials if search else 0)
    prompts = run.results["prompts"]["target_eval"]
    with run.timed("search"), SearchProgress(run.console, trials, run.records, prompts, run.scorer) as progress:

        def on_trials(records: list[TrialRecord]) -> None:
            for record in records:
                progress.update(record)
            run.records += records
            run.results["trials"] = [record.to_dict() for record in run.records]
            run.save()
            _follow(run, records)

        complete = run_search(run.world, search, objective, on_trials)
    if not complete:
        log.warning("the search was stopped after %d of %d trials", len(run.records), trials)


def search_edits(run: Run, objective: Objective) -> Search | None:
    """Search, from wherever an earlier run of the same command was ended."""
    search = open_search(run, objective)
    run.world.decide(lambda: _begin_following(run, search))
    continue_search(run, search, objective)
    return search


def _begin_following(run: Run, search: Search | None) -> None:
    if search is None:
        raise RuntimeError("the rank that decides holds the study")
    following = Following(run, search)
    following.start()
    run.following = following


def _follow(run: Run, records: list[TrialRecord]) -> None:
    """Tell of finished trials those who are told of each."""
    if run.folder is not None:
        for record in records:
            run.folder.write_log(record.in_words(run.scorer))
    if run.following is not None:
        run.following.trials(records)
