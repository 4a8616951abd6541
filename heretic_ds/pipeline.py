"""The story of a run, readable from top to bottom.

    inputs -> run folder -> response prefix -> directions -> search -> selection -> verification -> export -> report

Each stage leaves something in the run folder, so that the same command goes on where an earlier one was ended.
"""

from __future__ import annotations

from heretic_ds import stages
from heretic_ds.report.console import console, messages_to
from heretic_ds.settings import Settings

Scores = tuple[float, float]
"""What a sweep over runs minimises: (refusal rate, KL divergence in nats) of the verified edit."""


def run(settings: Settings) -> Scores | None:
    """Do what ``settings.task`` names.

    Raises UserError for what the user can mend, SearchFailed where the search found nothing to export.
    """
    with messages_to(console):
        return _TASKS[settings.task.name](settings)


def abliterate(settings: Settings) -> Scores | None:
    """Search for the edit that removes the behaviour, verify it on really edited weights, export the edited model."""
    interactive = stages.wants_menu(settings)
    if not interactive:
        if results := stages.already_finished(settings):
            return stages.objective_of(results)
        stages.refuse_used_export_folder(settings)
    with stages.opened(settings, console) as run:
        stages.find_response_prefix(run)
        stages.capture_directions(run)
        objective = stages.measure_original(run)
        search = stages.search_edits(run, objective)
        if interactive:
            return stages.menu(run, objective, search)
        chosen = stages.select_and_verify(run, objective, search)
        stages.report_front(run, search)
        stages.export_edited(run, chosen.edit, chosen.index)
        return stages.finish(run)


def evaluate(settings: Settings) -> Scores | None:
    """Score the model as it is, or with the fixed edit that ``ablation.*`` gives, on really edited weights."""
    with stages.opened(settings, console) as run:
        stages.find_response_prefix(run)
        stages.fixed_directions(run)
        objective = stages.measure_original(run)
        stages.score_fixed_edit(run, objective)
        return stages.finish(run)


def export(settings: Settings) -> Scores | None:
    """Write the model with the edit of one trial of an earlier run, or with the one that ``ablation.*`` gives."""
    stages.refuse_used_export_folder(settings)
    with stages.opened(settings, console) as run:
        edit, trial = stages.named_edit(run)
        stages.find_response_prefix(run)
        stages.fixed_directions(run)
        objective = stages.measure_original(run)
        stages.verify(run, objective, edit)
        stages.export_edited(run, edit, trial)
        return stages.objective_of(run.results)


def chat(settings: Settings) -> None:
    """Talk to the model in the terminal, as it is, or with the edit of a trial or of ``ablation.*``."""
    stages.talk(settings, console)


_TASKS = {"abliterate": abliterate, "evaluate": evaluate, "export": export, "chat": chat}
