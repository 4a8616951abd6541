"""What happens at a terminal: the menu after a search, and the chat."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from heretic_ds.ablation import Edit
from heretic_ds.errors import SearchFailed, UserError
from heretic_ds.export.target import check_export_target
from heretic_ds.export.upload import check_access, upload_export
from heretic_ds.foreign.reading import path_of
from heretic_ds.job import Job
from heretic_ds.placements import Engine, Evaluating, build_engine
from heretic_ds.search.objective import Objective
from heretic_ds.search.pareto import pareto_front
from heretic_ds.search.study import Search
from heretic_ds.search.trials import TrialRecord
from heretic_ds.settings import Settings
from heretic_ds.stages.facts import model_title
from heretic_ds.stages.finish import Exported, export_edited, objective_of, report_front, verify
from heretic_ds.stages.fixed import fixed_edit, named_edit
from heretic_ds.stages.measure import find_response_prefix, fixed_directions
from heretic_ds.stages.opening import Run, earlier_outcome, export_dir, may_replace, opened
from heretic_ds.stages.reporting import write_report
from heretic_ds.stages.search import continue_search
from heretic_ds.stages.sharing.packing import how_edited
from heretic_ds.stages.sharing.rescoring import final_scores
from heretic_ds.terminal.asking import asker_at
from heretic_ds.terminal.chat import COMMANDS, Edited, chat
from heretic_ds.terminal.faces import face_at
from heretic_ds.terminal.menu import MenuActions, run_menu
from heretic_ds.world import World

log = logging.getLogger(__name__)


def wants_menu(settings: Settings, world: World) -> bool:
    """Whether the run ends with a menu: as ``run.interactive`` says, else where there is somebody to ask. Never on
    several ranks, which would wait for one another's terminal."""
    if world.size > 1:
        return False
    if settings.run.interactive is not None:
        return settings.run.interactive
    return sys.stdin.isatty() and sys.stdout.isatty()


def menu(run: Run, objective: Objective, search: Search | None) -> tuple[float, float] | None:
    """Let the user choose trials, save them, talk to them, or search on. Returns the scores of what was saved last.

    What an earlier run in the folder chose, verified and finished stays on record until something else is chosen.
    """
    run.results.update(earlier_outcome(run))
    report_front(run)
    if search is None or not run.records:
        raise SearchFailed("no trial was finished, so there is nothing to choose from; run the same command again")
    write_report(run)
    front, saved = pareto_front(run.records), dict[Path, Exported]()

    def by_index(index: int) -> TrialRecord:
        return next(record for record in run.records if record.index == index)

    def save(index: int, folder: str) -> None:
        wanted = path_of(folder, "folder")
        own = wanted.resolve() == export_dir(run.settings).resolve() and may_replace(run.settings)
        overwrite = run.settings.export.overwrite or own or wanted.resolve() in saved
        target = check_export_target(wanted, overwrite, source=run.job.opened.source.folder)
        scores = verify(run, objective, by_index(index).edit)
        told = "trial %d %s: %g %s, KL %.3g"
        log.info(told, index, how_edited(run), scores.refusals, run.scorer, scores.kl)
        run.results["selected"], run.results["final"] = index, None
        run.results.pop("finished", None)
        saved.pop(target, None)  # the last one of a folder, and of all, comes last
        saved[target] = export_edited(run, by_index(index).edit, index, target)
        report_front(run)
        write_report(run)

    def talk_to(index: int) -> None:
        _talk(run.job, run.engine, run.console, _worn(run.engine, by_index(index).edit, f"trial {index}"))

    def more_trials(count: int) -> tuple[Sequence[TrialRecord], Sequence[int]]:
        run.results.pop("finished", None)
        search.trials = len(run.records) + count
        continue_search(run, search, objective)
        report_front(run)
        write_report(run)
        return run.records, pareto_front(run.records)

    def upload(index: int, folder: str, repository: str, private: bool) -> None:
        wanted = path_of(folder, "folder")
        check_access(repository)
        save(index, folder)
        log.info("the model is at %s", upload_export(wanted, repository, private, run.settings.export.overwrite))

    chosen, folder = run.settings.export, str(export_dir(run.settings))
    repository = chosen.repo or f"{model_title(run.job).rsplit('/', 1)[-1]}-abliterated"
    actions = MenuActions(
        save, talk_to, more_trials, upload, folder, repository, chosen.private, chosen.max_kl, run.scorer
    )
    run_menu(actions, run.records, front, asker_at(run.console), run.console)
    run.save()
    if saved:
        _score_what_was_saved(run, list(saved.values()))
    return objective_of(run.results)


def _score_what_was_saved(run: Run, saved: Sequence[Exported]) -> None:
    """Final scores, which take the engine that a menu needs, once the user has left it; Ctrl-C leaves them out."""
    try:
        final_scores(run, *saved)
    except KeyboardInterrupt:
        log.warning("stopped: there are no final scores of what was saved last")
    run.save()
    write_report(run)


def talk(settings: Settings, world: World, console: Console) -> None:
    """Talk to the original model, or to the edited one where ``export.trial`` or ``ablation.*`` names an edit."""
    if world.size > 1:
        raise UserError("task=chat runs in one process; start it without the launcher")
    if settings.export.trial is None and fixed_edit(settings) is None:
        log.info("this is the original model; export.trial or ablation.profiles.* choose an edited one")
        job = Job.check(settings, world, with_prompts=False)
        _talk(job, build_engine(job, "evaluate"), console)
        return
    edit, record = named_edit(settings, world)
    with opened(settings, world, console) as run:
        find_response_prefix(run)
        fixed_directions(run)
        name = f"trial {record.index}" if record else "ablation.profiles"
        _talk(run.job, run.engine, console, _worn(run.engine, edit, name))


def _worn(engine: Evaluating, edit: Edit, name: str) -> Edited:
    """An edit of the engine's weights that a chat puts on and takes off."""
    return Edited(name, lambda: engine.apply(edit), engine.restore)


def _talk(job: Job, engine: Engine, console: Console, edited: Edited | None = None) -> None:
    if engine.whole is None:
        raise UserError("this placement holds no whole model to talk to; set evaluate=replicated")
    face, name = face_at(console, list(COMMANDS)), model_title(job)
    tokens = job.settings.task.answer_tokens
    chat(engine.whole.model, job.chat, max_new_tokens=tokens, face=face, name=name, edited=edited)
