"""The last stages: the front, the choice and its verification, the export, the results."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Writer
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CARD_NAME
from heretic_ds.errors import SearchFailed, UserError
from heretic_ds.export.adapter import holds_export
from heretic_ds.export.card import AdapterFacts, CardFacts, model_card
from heretic_ds.export.checkpoint import Beside, export_adapter, export_model
from heretic_ds.export.gguf import convert_to_gguf
from heretic_ds.export.manifest import build_manifest, public_model_name
from heretic_ds.export.reproduce import how_written
from heretic_ds.export.target import MANIFEST_NAME
from heretic_ds.foreign.disk import write_atomically
from heretic_ds.foreign.reading import read_json
from heretic_ds.prompts import KINDS, PARTS, TEST
from heretic_ds.report.plots import FrontFacts, plot_front
from heretic_ds.report.stages import took
from heretic_ds.report.tables import agreement_table, pareto_table, score_in_words
from heretic_ds.run_folder import RESULTS_NAME
from heretic_ds.scoring.agreement import Agreement
from heretic_ds.search.objective import Objective
from heretic_ds.search.pareto import candidates, closest, pareto_front
from heretic_ds.search.trials import TrialRecord, TrialScores
from heretic_ds.settings import AUTO_TEST, Settings
from heretic_ds.settings.scoring import MAXIMIZE
from heretic_ds.stages.facts import model_title
from heretic_ds.stages.opening import Run, export_dir, may_replace
from heretic_ds.stages.reporting import write_report
from heretic_ds.stages.sharing.adapting import verified_adapter
from heretic_ds.stages.sharing.packing import from_files, how_edited, what_to_write

log = logging.getLogger(__name__)

EXAMPLES = 6
"""Prompts whose answers before and after are kept in the results."""


@dataclass(frozen=True)
class Exported:
    """An export that was written, or was there already."""

    folder: Path
    facts: CardFacts
    """What its card tells."""
    dtype: torch.dtype
    """Of its weights."""


def report_front(run: Run) -> None:
    """Show the Pareto front as a table, draw it, and keep what the search found. The selected trial is marked."""
    records, results = run.records, run.results
    front = pareto_front(records)
    results["trials"], results["pareto"] = [record.to_dict() for record in records], front
    original, prompts = results["baseline"]["refusals"], results["prompts"]["target_eval"]
    selected = results["selected"]
    if front:
        table = pareto_table(records, front, original, prompts, selected, run.scorer, run.console.width)
        run.console.print(table, no_wrap=True)
    show_agreement(run)
    if run.folder is not None:
        facts = FrontFacts(model_title(run.job), original, prompts, run.settings.export.max_kl, run.scorer)
        plot_front(run.folder.front_plot, records, front, facts, selected)
    run.save()


def verify(run: Run, objective: Objective, edit: Edit | None) -> TrialScores:
    """Score an edit (None: the original) on really edited weights, which stay edited; where weights are packed in few
    bits, on edited outputs."""
    with run.timed("verify"):
        if edit is None:
            run.engine.restore()
        else:
            run.engine.apply(edit)
        scores = objective.score([None])[0]
    run.results["examples"] = objective.examples(EXAMPLES)
    note_verified(run, objective, scores)
    return scores


def note_verified(run: Run, objective: Objective, scores: TrialScores) -> None:
    """Keep scores of the edited model, and how far scorers agree that flag answers to the same prompts, of the original
    and of the edited model."""
    run.results["verified"] = {"refusals": scores.refusals, "kl": scores.kl, "scores": dict(scores.scores)}
    told = {"original": objective.original.agreements, "edited": scores.agreements}
    if any(told.values()):
        run.results["agreement"] = {name: [each.to_dict() for each in found] for name, found in told.items()}


def show_agreement(run: Run) -> None:
    """Print that as tables of counts."""
    for name, entries in run.results.get("agreement", {}).items():
        for entry in entries:
            run.console.print(agreement_table(Agreement.from_dict(entry), f"the {name} model"), no_wrap=True)


def verify_trial(run: Run, objective: Objective, record: TrialRecord) -> TrialScores:
    """:func:`verify` the edit of a trial, and show its scores beside those of the search."""
    scores = verify(run, objective, record.edit)
    log.info(
        "trial %d: %s at KL %.3g in the search, %s at KL %.3g %s",
        record.index, score_in_words(float(record.refusals or 0.0), run.scorer), record.kl,
        score_in_words(scores.refusals, run.scorer), scores.kl, how_edited(run),
    )  # fmt: skip
    return scores


def select_and_verify(run: Run, objective: Objective) -> TrialRecord:
    """Choose a trial and score it again on really edited weights; one whose KL is then too large gives way to the
    next. Raises SearchFailed where none is left, UserError where ``export.trial`` names none."""
    max_kl, wanted = run.settings.export.max_kl, run.settings.export.trial
    choice = candidates(run.records, max_kl)
    if wanted is not None:
        choice = [record for record in run.records if record.index == wanted and record.complete]
        if not choice:
            raise UserError(f"export.trial={wanted}: the search has no finished trial of that number")
    for record in choice:
        kl = run.world.same(verify_trial(run, objective, record).kl)  # all ranks go on with one trial
        if kl <= max_kl or wanted is not None:
            run.results["selected"] = record.index
            return record
        told = "trial %d exceeds export.max_kl=%g %s; trying the next"
        log.warning(told, record.index, max_kl, how_edited(run))
    run.engine.restore()
    run.results["verified"], run.results["examples"] = None, []
    run.results.pop("agreement", None)
    report_front(run)
    write_report(run)
    nearest = closest(run.records)
    found = f"the closest was trial {nearest.index} with KL {nearest.kl:.3g}" if nearest else "no trial was finished"
    raise SearchFailed(f"no trial stays within export.max_kl={max_kl:g}: {found}; nothing was exported")


def export_edited(run: Run, edit: Edit, trial: int | None, folder: Path | None = None) -> Exported:
    """Write the edited model that the engine holds, with its card and manifest; skipped where it is there already.

    A model that lies whole on rank 0 is written by it, with the very numbers that were verified; else, and where its
    weights were packed in few bits, all ranks edit the checkpoint's files.
    """
    with run.timed("export") as work:
        target, world, form = folder or export_dir(run.settings), run.world, run.settings.export.format
        adapter = None if form == "model" else verified_adapter(run, edit)
        loaded, weights = what_to_write(run, edit)
        exported = Exported(target, _card_facts(run, edit, trial), run.engine.dtype)
        described = world.decide(partial(_describe, run, loaded, exported))
        if described is None:
            log.info("%s holds this very %s already", target, "adapter" if form == "adapter" else "model")
        else:
            beside = Beside(adapter, run.settings.export.max_shard_size, run.ablation.stored)
            if form == "adapter":
                done = export_adapter(loaded, target, *described, world, beside)
            else:
                done = export_model(loaded, target, *described, weights, world, beside)
            written = done.weight_bytes / 1e6
            log.info("wrote %d tensors, %.1f MB, to %s, %s", done.tensors, written, done.folder, took(work))
        if run.settings.export.gguf:
            name = public_model_name(loaded).rsplit("/", 1)[-1]
            made = world.decide(partial(convert_to_gguf, target, name), "converting the model to GGUF")
            log.info("wrote %s", made)
    return exported


def describe_anew(run: Run, exported: Exported, final: Mapping[str, Any]) -> None:
    """Write card and manifest of an export once more, with its final scores: the work of rank 0."""
    opened, folder, dtype = run.job.opened, exported.folder, exported.dtype
    card = model_card(opened.loaded(opened.skeleton(dtype), dtype), replace(exported.facts, final=final))
    manifest = read_json(folder / MANIFEST_NAME) | {"final": dict(final)}
    for name, text in ((CARD_NAME, card), (MANIFEST_NAME, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")):
        write_atomically(folder / name, text, "export.dir")
        (folder / name).chmod(0o644)  # as all of an export


def _describe(run: Run, loaded: LoadedModel, exported: Exported) -> tuple[str, dict[str, Any], bool] | None:
    """Card and manifest of an export, and whether it may replace what is there; None where it is there already."""
    settings, results, facts, target = run.settings, run.results, exported.facts, exported.folder
    chosen, device = settings.export, run.job.opened.device
    manifest = build_manifest(
        loaded,
        trial=facts.trial,
        edit=facts.edit.to_dict(),
        row_norm=facts.row_norm,
        through_norm=facts.through_norm,
        direction_method=facts.method,
        rank=facts.rank,
        scores=_scores_of(results, facts.trial),
        verified=results["verified"],
        tensors_edited=[writer.weight for writer in _edited(run, facts.edit)],
        run_id=run.measured["run_id"],
        format=facts.form,
        adapter=results.get("adapter"),
        how=how_written(device, from_files(run), chosen.max_shard_size, chosen.adapter_rank),
        searched_in=facts.quantization,
    )
    if _same_export(settings, target, manifest):
        return None
    overwrite = chosen.overwrite or (target == export_dir(settings) and may_replace(settings))
    return model_card(loaded, facts), manifest, overwrite


def _edited(run: Run, edit: Edit) -> list[Writer]:
    """The writers whose weights an edit changes."""
    return [writer for writer in run.job.anatomy.writers if edit.strength(writer.component, writer.block) != 0.0]


def _card_facts(run: Run, edit: Edit, trial: int | None) -> CardFacts:
    settings, results = run.settings, run.results
    counts: Counter[str] = Counter()
    for writer in _edited(run, edit):
        counts[writer.component] += writer.experts or 1
    return CardFacts(
        edit=edit,
        row_norm=settings.ablation.row_norm,
        through_norm=settings.ablation.through_norm,
        orthogonalize=settings.direction.orthogonalize,
        winsorize_quantile=settings.direction.winsorize_quantile,
        rank=run.ablation.rank,
        method=settings.direction.method,
        writers=dict(counts),
        refusals_before=results["baseline"]["refusals"],
        refusals_after=results["verified"]["refusals"],
        target_prompts=results["prompts"]["target_eval"],
        kl=results["verified"]["kl"],
        baseline_prompts=results["prompts"]["baseline_eval"],
        prompt_sources=_prompt_sources(run),
        trial=trial,
        scorer=run.scorer,
        maximize=run.job.scorers[0].direction == MAXIMIZE,
        form=settings.export.format,
        quantization=run.job.held_as,
        adapter=None if results.get("adapter") is None else AdapterFacts(**results["adapter"]),
    )


def _scores_of(results: dict[str, Any], trial: int | None) -> dict[str, Any]:
    return next(({k: t[k] for k in ("refusals", "kl")} for t in results["trials"] if t["index"] == trial), {})


def _prompt_sources(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in KINDS:
        pair = getattr(run.settings.prompts, kind)
        found |= {f"{kind}.{part}": getattr(pair, part).source for part in PARTS}
        if f"{kind}.{TEST}" in run.job.texts:
            found[f"{kind}.{TEST}"] = pair.eval.source if pair.test.source == AUTO_TEST else pair.test.source
    return found


def _same_export(settings: Settings, target: Path, manifest: dict[str, Any]) -> bool:
    """Whether the folder was made by a run with this very outcome: one that was killed between export and results."""
    file = target / MANIFEST_NAME
    if not file.is_file() or not holds_export(target, settings.export.format):
        return False
    stored = read_json(file)
    same = (
        "base_model", "edit", "row_norm", "through_norm", "trial", "verified", "dtype", "run_id", "format", "adapter",
    )  # fmt: skip
    return all(stored.get(key) == manifest[key] for key in same)


def finish(run: Run) -> tuple[float, float] | None:
    """Keep the results of a run that came to its end. Returns (refusal rate, KL) of the verified edit.

    Where the user stopped the search, the run is not finished: the same command goes on with it.
    """
    stopped = run.settings.task.name == "abliterate" and len(run.records) < run.settings.search.trials
    run.save(finished=not stopped)
    log.info("results are in %s", run.path / RESULTS_NAME)
    if stopped:
        log.info("the same command goes on with the search and replaces the exported model")
    return objective_of(run.results)


def objective_of(results: dict[str, Any]) -> tuple[float, float] | None:
    """(refusal rate, KL) of a run's verified edit, which is what a sweep over runs minimises.

    A first scorer that counts nothing gives its score in place of the rate, one that is maximised the negated one.
    """
    verified = results["verified"]
    if verified is None:
        return None
    scorer: dict[str, Any] = next(iter(results.get("scorers", ())), {})
    score = verified["refusals"]
    if scorer.get("combine", "sum") == "sum":
        score /= scorer.get("count", results["prompts"]["target_eval"])
    return -score if scorer.get("direction") == MAXIMIZE else score, verified["kl"]
