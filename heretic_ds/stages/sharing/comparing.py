"""One model against another: what somebody's edited model does beside its original."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.prompts.own import USUAL
from heretic_ds.report.tables import share_in_words
from heretic_ds.stages.finish import note_verified, show_agreement
from heretic_ds.stages.fixed import note_one_trial
from heretic_ds.stages.measure import find_response_prefix, measure_original
from heretic_ds.stages.opening import Run

log = logging.getLogger(__name__)


def compare_models(run: Run) -> None:
    """Score the run's model against the original that ``evaluate.against`` names: the one trial of the results.

    One is in memory at a time, under the same placement; both answer prompts that each one's own chat template puts,
    after the response prefix of the original. Raises UserError where they do not share a vocabulary.
    """
    edited, original = run.job, _original(run)
    run.close()
    run.job = original
    find_response_prefix(run)
    objective = measure_original(run)
    run.close()
    edited.chat = edited.chat.with_prefix(original.chat.response_prefix)
    edited.check_lengths()
    run.job, started = edited, time.perf_counter()
    with run.timed("verify"):
        usual = {name: edited.prompts(name) for name in USUAL}
        own = edited.own_prompts(usual)
        scores = objective.of_other(run.engine, usual["target.eval"], usual["baseline.eval"], own)
    note_one_trial(run, None, scores, time.perf_counter() - started)
    note_verified(run, objective, scores)
    run.results["against"] = original.opened.source.name
    show_agreement(run)
    log.info(
        "%s: %s, %g by %s; KL from it %.6g",
        edited.opened.source.name, share_in_words(scores.refusals, run.results["prompts"]["target_eval"], run.scorer),
        objective.original.refusals, original.opened.source.name, scores.kl,
    )  # fmt: skip


def _original(run: Run) -> Job:
    """The original's inputs, checked against those of the model that is compared with it."""
    settings, against = run.settings, str(run.settings.task.against)
    model = replace(settings.model, path=against, revision=None)
    try:
        job = Job.check(replace(settings, model=model), run.world)
    except UserError as error:
        raise UserError(str(error).replace(f"model.path={against}", f"evaluate.against={against}")) from error
    ours, theirs = (each.opened.tokenizer.get_vocab() for each in (run.job, job))
    if ours != theirs:
        raise UserError(
            f"evaluate.against={against} has another vocabulary than {Path(settings.model.path).name}, so their "
            "next-token distributions cannot be compared; give the model that it was made from"
        )
    return job
