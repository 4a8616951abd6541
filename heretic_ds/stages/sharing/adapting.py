"""The adapter of an edit, made from the original's weights and scored on the original with it."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial

from heretic_ds.ablation import Edit
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.edits.adapters import Adapter, make_adapter, worn
from heretic_ds.export.adapter import stored_writer
from heretic_ds.export.card import AdapterFacts
from heretic_ds.report.tables import score_in_words
from heretic_ds.stages.opening import Run
from heretic_ds.stages.sharing.packing import reader_of_writers

log = logging.getLogger(__name__)


def verified_adapter(run: Run, edit: Edit) -> Adapter | None:
    """The adapter that does what an edit does, its scores among the results; weights are afterwards those of the edit.

    A model that lies whole on each rank is scored with it. Of others rank 0 alone makes it, from the files, and has it:
    it is exact, so the scores of the edited weights are its own.
    """
    whole = run.engine.whole
    return _stored(run, edit) if whole is None else _resident(run, edit, whole)


def _resident(run: Run, edit: Edit, whole: LoadedModel) -> Adapter:
    engine, objective = run.engine, run.objective
    if objective is None:
        raise RuntimeError("no stage has measured the original")
    engine.restore()
    read = run.world.agree(lambda: reader_of_writers(run, whole))
    rank = run.settings.export.adapter_rank
    adapter = run.world.agree(
        lambda: make_adapter(run.job.anatomy, run.ablation, edit, read, rank), "making the adapter"
    )
    with run.timed("verify"):
        with worn(whole.model, adapter):
            engine.prepare(run.ablation)  # steps that were captured before know no adapter
            scores = objective.score([None])[0]
        engine.prepare(run.ablation)
    engine.apply(edit)
    run.results["adapter"] = asdict(AdapterFacts(*_kind_of(adapter), scores.refusals, scores.kl))
    log.info(
        "an adapter of rank %d, %s: %s at KL %.3g on the original with it",
        adapter.rank, _how_near(adapter), score_in_words(scores.refusals, run.scorer), scores.kl,
    )  # fmt: skip
    limit = run.settings.export.max_kl
    if scores.kl > limit:
        log.warning("with the adapter KL exceeds export.max_kl=%g; a larger export.adapter_rank comes nearer", limit)
    return adapter


def _stored(run: Run, edit: Edit) -> Adapter | None:
    made: list[Adapter] = []

    def make() -> AdapterFacts:
        _, checkpoint = run.job.opened.empty_model(run.engine.dtype)
        read = partial(stored_writer, checkpoint)
        made.append(make_adapter(run.job.anatomy, run.ablation, edit, read, run.settings.export.adapter_rank))
        return AdapterFacts(*_kind_of(made[0]), None, None)

    facts = run.world.decide(make, "making the adapter")
    run.results["adapter"] = asdict(facts)
    log.info("an adapter of rank %d, exact: the scores of the edited weights are its own", facts.rank)
    return made[0] if made else None


def _kind_of(adapter: Adapter) -> tuple[int, bool, float, float]:
    return adapter.rank, adapter.exact, adapter.error, adapter.largest_error[0]


def _how_near(adapter: Adapter) -> str:
    if adapter.exact:
        return "exact"
    largest, module = adapter.largest_error
    return f"which leaves out {adapter.error:.2%} of the edit, {largest:.2%} at most ({module})"
