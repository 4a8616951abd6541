"""The story of a run, readable from top to bottom.

    inputs -> run folder -> response prefix -> directions -> search -> selection -> verification -> export
           -> final scores -> report

Each stage leaves something in the run folder, so that the same command goes on where an earlier one was ended.
"""

from __future__ import annotations

import logging

from rich.console import Console

from heretic_ds.export.upload import upload_export
from heretic_ds.foreign.libraries import quiet_libraries
from heretic_ds.report.console import console_of, messages_to
from heretic_ds.report.library_bars import counted_here
from heretic_ds.report.stages import StageProgress
from heretic_ds.settings import Settings
from heretic_ds.stages.finish import export_edited, finish, objective_of, report_front, select_and_verify
from heretic_ds.stages.fixed import named_edit, score_fixed_edit, verify_named
from heretic_ds.stages.geometry import measure_geometry, refuse_missing_projection, show_geometry
from heretic_ds.stages.measure import capture_directions, find_response_prefix, fixed_directions, measure_original
from heretic_ds.stages.opening import already_finished, export_dir, opened, refuse_used_export_folder
from heretic_ds.stages.planning import make_and_show_plan
from heretic_ds.stages.reporting import write_report
from heretic_ds.stages.search import search_edits, settle_strategy
from heretic_ds.stages.sharing.benchmarking import run_benchmarks
from heretic_ds.stages.sharing.comparing import compare_models
from heretic_ds.stages.sharing.rescoring import final_scores
from heretic_ds.stages.talk import menu, talk, wants_menu
from heretic_ds.stages.tracking import check_tracking
from heretic_ds.world import World

log = logging.getLogger(__name__)

Scores = tuple[float, float]
"""What a sweep over runs minimises: (refusal rate, KL divergence in nats) of the verified edit."""


def run(settings: Settings) -> Scores | None:
    """Do what ``settings.task`` names.

    Raises UserError for what the user can mend, SearchFailed where the search found nothing to export.
    """
    world = World.join()
    with quiet_libraries(), messages_to(console_of(world)) as console, counted_here(), StageProgress(console):
        result = _TASKS[settings.task.name](settle_strategy(settings, world), world, console)
    world.leave()
    return result


def abliterate(settings: Settings, world: World, console: Console) -> Scores | None:
    """Search for the edit that removes the behaviour, verify it on really edited weights, export the edited model."""
    check_tracking(settings, world)
    interactive = wants_menu(settings, world)
    if not interactive:
        if results := already_finished(settings, world):
            return objective_of(results)
        refuse_used_export_folder(settings, world)
    with opened(settings, world, console) as run:
        find_response_prefix(run)
        capture_directions(run)
        objective = measure_original(run)
        search = search_edits(run, objective)
        if interactive:
            return menu(run, objective, search)
        chosen = select_and_verify(run, objective)
        report_front(run)
        final_scores(run, export_edited(run, chosen.edit, chosen.index))
        run.save()
        write_report(run)
        return finish(run)  # last: what is finished is not opened again


def evaluate(settings: Settings, world: World, console: Console) -> Scores | None:
    """Score the model as it is, or with the fixed edit that ``ablation.*`` gives, on really edited weights; or compare
    it with its original."""
    with opened(settings, world, console) as run:
        if settings.task.against is not None:
            compare_models(run)
            return finish(run)
        find_response_prefix(run)
        fixed_directions(run)
        objective = measure_original(run)
        score_fixed_edit(run, objective)
        return finish(run)


def export(settings: Settings, world: World, console: Console) -> Scores | None:
    """Write the model with the edit of one trial of an earlier run, or with the one that ``ablation.*`` gives."""
    edit, record = named_edit(settings, world)
    refuse_used_export_folder(settings, world)
    with opened(settings, world, console) as run:
        find_response_prefix(run)
        fixed_directions(run)
        objective = measure_original(run)
        verify_named(run, objective, edit, record)
        final_scores(run, export_edited(run, edit, record.index if record else None))
        return objective_of(run.results)


def upload(settings: Settings, world: World, console: Console) -> None:
    """Write an exported model to the Hugging Face Hub."""
    chosen, folder = settings.export, export_dir(settings)
    address = world.decide(
        lambda: upload_export(folder, chosen.repo, chosen.private, chosen.overwrite), "uploading the model"
    )
    log.info("%s is at %s", folder, address)


def chat(settings: Settings, world: World, console: Console) -> None:
    """Talk to the model in the terminal, as it is, or with the edit of a trial or of ``ablation.*``."""
    talk(settings, world, console)


def plan(settings: Settings, world: World, console: Console) -> None:
    """Say what each placement would need and take, and which ones would be chosen, without reading any weights."""
    make_and_show_plan(settings, world, console)


def geometry(settings: Settings, world: World, console: Console) -> None:
    """Measure and draw how the residuals of the two kinds of train prompts lie towards each other, layer by layer."""
    refuse_missing_projection(settings, world)
    with opened(settings, world, console) as run:
        find_response_prefix(run)
        show_geometry(run, measure_geometry(run))
        write_report(run)


def benchmark(settings: Settings, world: World, console: Console) -> None:
    """Ask the original and the exported model what benchmarks ask, and show their scores side by side."""
    run_benchmarks(settings, world, console)


_TASKS = {
    "abliterate": abliterate,
    "evaluate": evaluate,
    "export": export,
    "upload": upload,
    "chat": chat,
    "plan": plan,
    "geometry": geometry,
    "benchmark": benchmark,
}
