"""Final scores: an export, read from disk again, beside the original, on prompts that nothing was chosen by."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.edits.adapters import Adapter, worn
from heretic_ds.errors import UserError
from heretic_ds.export.final import FinalRow, final_rows, number_text, range_text
from heretic_ds.export.merging import MergedFiles, link_companions, read_adapter
from heretic_ds.export.target import MANIFEST_NAME, scratch_folder
from heretic_ds.fingerprint import final_fingerprint
from heretic_ds.foreign.reading import read_json
from heretic_ds.job import Job
from heretic_ds.memory import free_on_host
from heretic_ds.placements import Evaluating, build_engine, placements_of
from heretic_ds.prompts import KINDS, PARTS, TEST, ChatFormat, PromptSet, overlaps, room_for_answers
from heretic_ds.report.final import final_table
from heretic_ds.report.stages import took
from heretic_ds.stages.finish import Exported, describe_anew
from heretic_ds.stages.opening import Run
from heretic_ds.verifying.final import (
    Measured,
    Original,
    Question,
    final_results,
    measure_original,
    measure_other,
    side_by_side,
)
from heretic_ds.verifying.intervals import Bootstrap

log = logging.getLogger(__name__)

_ROOM = 1.5
"""Memory that a model takes while it is scored, in multiples of its weights."""


def final_scores(run: Run, *exported: Exported) -> None:
    """Score what was exported, and write it to the results, to its card and to its manifest; shown is the last of it.

    The run's own engine is closed for that: one model is in memory at a time, under the placement that evaluates. What
    a manifest holds already, of an earlier run that was ended behind this, is taken from there. Where the original
    cannot be scored, for want of memory or of room for such answers, there are none, which is said: the run has done
    its work.
    Raises UserError for an export that cannot be read again.
    """
    run.results["final"] = None
    if not run.settings.verify.final or not exported:
        return
    asked = _asked(run)
    with run.timed("final") as work:
        left = [each for each in exported if run.world.decide(partial(_known, each, asked)) is None]
        left = [each for each in left if _seen_everywhere(run, each.folder)]
        if left:
            run.close()
            run.objective = None
            _score(run, left, asked)
        run.results["final"] = run.world.decide(partial(_known, exported[-1], asked))
        if run.results["final"] is not None:
            _show(run, took(work))


def _score(run: Run, exported: list[Exported], asked: Mapping[str, Any]) -> None:
    """Measure the original once, then each export; what is found goes into its card and manifest."""
    verify, world = run.settings.verify, run.world
    original_job = _unpacked_where_it_fits(_with_longer_answers(run.job))
    question = Question(
        original_job.scorers,
        original_job.text_of,
        original_job.settings.generation.max_new_tokens,
        verify.kl_tokens,
    )
    try:
        with _laid_out(original_job) as engine:
            original = measure_original(engine, _prompts(original_job), question, world)
            sizes = dict(engine.batch_sizes)
    except UserError as error:  # raised alike on all ranks; what was exported is whole, and not to blame
        log.warning("no final scores: %s; lower verify.answer_tokens, or set verify.final=false", error)
        return
    bootstrap = Bootstrap(verify.resamples, verify.seed)
    for each in exported:
        edited = _measured(run, original_job, each, question, original, sizes)
        scores = side_by_side(original.scores, edited, bootstrap)
        held = original_job.held_as
        more = {"form": each.facts.form, "quantization": held, "asked": dict(asked)}
        final = final_results(scores, _parts(run.job), question, bootstrap, more)
        world.decide(partial(describe_anew, run, each, final))


def _measured(
    run: Run, original_job: Job, each: Exported, question: Question, original: Original, sizes: Mapping[str, int]
) -> Measured:
    """What an export does, of which nothing comes from memory."""
    with _read_again(run, original_job, each) as (job, adapter), _laid_out(job, sizes) as engine, ExitStack() as stack:
        if adapter is not None and engine.whole is not None:
            stack.enter_context(worn(engine.whole.model, adapter))
        question = replace(question, text_of=job.text_of)
        return measure_other(engine, _prompts(job), question, original, run.world)


@contextmanager
def _read_again(run: Run, original: Job, each: Exported) -> Iterator[tuple[Job, Adapter | None]]:
    """The job on what was exported. An adapter alone is worn by the original where that lies whole on each rank, else
    it is added to the original's weights, in files that are there while the context lasts."""
    if each.facts.form != "adapter":
        yield _reloaded(original, each.folder), None
        return
    world, opened, anatomy = run.world, original.opened, original.anatomy
    adapter = world.agree(lambda: read_adapter(each.folder, anatomy, opened.skeleton(each.dtype)))
    if placements_of(original.settings)["evaluate"].resident:
        yield original, adapter
        return
    with ExitStack() as stack:
        folder = Path(world.decide(lambda: str(stack.enter_context(scratch_folder(each.folder)))))
        files = world.agree(lambda: MergedFiles.of(opened, anatomy, run.ablation, adapter, each.dtype))
        files.write(world, folder, folder)
        world.decide(lambda: link_companions(opened, folder))
        yield _reloaded(original, folder), None


def _reloaded(job: Job, folder: Path) -> Job:
    """The same job on a model of this run's own making."""
    world, model = job.world, replace(job.settings.model, path=str(folder), revision=None)
    settings, choice = replace(job.settings, model=model), ModelChoice(**asdict(model))
    opened = world.agree(lambda: open_model(choice), "opening the model")
    anatomy = world.agree(lambda: find_anatomy(opened.checked_skeleton()))
    chat = world.agree(lambda: ChatFormat(opened.tokenizer, settings.prompts))
    return replace(
        job, settings=settings, opened=opened, anatomy=anatomy, chat=chat.with_prefix(job.chat.response_prefix)
    )


def _with_longer_answers(job: Job) -> Job:
    """The same job on the prompts of final scores alone, with answers as long as ``verify.answer_tokens`` asks for, or
    as the context has room for."""
    wanted, chosen = job.settings.verify.answer_tokens, [_chosen(job, kind) for kind in KINDS]
    rows = [row for name in chosen for row in job.prompts(name).rows]
    room = room_for_answers(rows, job.opened.config)
    longest = wanted if room is None else min(wanted, room)
    if longest < wanted:
        log.info("verify.answer_tokens=%d: the model's context has room for answers of %d tokens", wanted, longest)
    generation = replace(job.settings.generation, max_new_tokens=longest)
    texts = {name: job.texts[name] for name in chosen}
    return replace(job, settings=replace(job.settings, generation=generation), texts=texts)


def _unpacked_where_it_fits(job: Job) -> Job:
    """The same job on weights that are not packed in few bits, as exports are not, where each rank has room for them;
    else both models are scored as the search did. All ranks ask."""
    quantization, opened, world = job.settings.model.quantization, job.opened, job.world
    if job.held_as == bnb.NONE:
        return job
    numbers = sum(parameter.numel() for parameter in opened.skeleton().parameters())
    needed, on_host = _ROOM * numbers * opened.dtypes[0].itemsize, opened.device.type == "cpu"
    sharers = world.machine().most if on_host and world.size > 1 else 1
    free = free_on_host() if on_host else torch.cuda.mem_get_info(opened.device)[0]
    if not all(world.gather(needed * sharers <= free)):
        log.warning(
            "final scores are taken with %s, of both models, as in the search: there is no room for weights that are "
            "not packed", bnb.in_words(quantization),
        )  # fmt: skip
        return job
    model = replace(job.settings.model, quantization=bnb.NONE)
    choice = replace(opened.choice, quantization=bnb.NONE)
    return replace(job, settings=replace(job.settings, model=model), opened=replace(opened, choice=choice))


@contextmanager
def _laid_out(job: Job, sizes: Mapping[str, int] | None = None) -> Iterator[Evaluating]:
    """A job's model under the placement that evaluates; ``sizes`` are batches that were measured for another one."""
    engine: Evaluating = build_engine(job, "evaluate")
    if sizes:
        engine.batch_sizes.update(sizes)
    try:
        yield engine
    finally:
        engine.close()


def _chosen(job: Job, kind: str) -> str:
    """The prompts of a kind that final scores are taken on: the eval part stands in where there is no test part."""
    name = f"{kind}.{TEST}"
    return name if name in job.texts else f"{kind}.eval"


def _prompts(job: Job) -> dict[str, PromptSet]:
    return {kind: job.prompts(_chosen(job, kind)) for kind in KINDS}


def _parts(job: Job) -> dict[str, Any]:
    """Of each kind which prompts final scores are on, how many, and how many of them the search or directions saw."""
    found = {}
    for kind in KINDS:
        name = _chosen(job, kind)
        texts = job.texts[name]
        known = [text for part in PARTS for text in job.texts[f"{kind}.{part}"]]
        found[kind] = {
            "part": name.partition(".")[2],
            "prompts": len(texts),
            "seen": overlaps({"known": known, "chosen": texts}).get("known, chosen", 0),
        }
    return found


def _asked(run: Run) -> dict[str, Any]:
    """Settings and prompts that final scores depend on, beside those that a run folder is bound to."""

    def digest(texts: list[str]) -> str:
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    digests = {f"prompts.{name}.digest": digest(run.job.texts[name]) for name in (_chosen(run.job, k) for k in KINDS)}
    return final_fingerprint(run.settings) | digests


def _known(exported: Exported, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The final scores that an export's manifest holds, where they are what is asked for."""
    file = exported.folder / MANIFEST_NAME
    final = read_json(file).get("final") if file.is_file() else None
    return final if isinstance(final, dict) and final.get("asked") == asked else None


def _seen_everywhere(run: Run, folder: Path) -> bool:
    """Whether all ranks see an export, which ranks of other machines may not."""
    seen = run.world.gather((folder / MANIFEST_NAME).is_file())
    if not all(seen):
        log.warning(
            "no final scores: %d of %d ranks do not see %s; set export.dir to a folder that all machines share",
            seen.count(False), len(seen), folder,
        )  # fmt: skip
    return all(seen)


def _in_words(row: FinalRow, scored: Mapping[str, float | None] | None) -> str:
    if scored is None:
        return "-"
    ends = range_text(scored, row.counts)
    return number_text(scored["score"], row.counts) + (f" ({ends})" if ends else "")


def _show(run: Run, seconds: str) -> None:
    final = run.results["final"]
    run.console.print(final_table(final, run.console.width))
    for row in final_rows(final):  # the log has no tables
        before, after = (_in_words(row, scored) for scored in (row.original, row.edited))
        log.info(
            "final %s on %d %s prompts: original %s, edited %s",
            row.label, row.prompts, row.kind, before, after, extra={"console": False},
        )  # fmt: skip
    for kind, part in final["prompts"].items():
        if part["part"] != TEST:
            log.warning(
                "final scores of %s prompts are on the eval prompts, which also chose the edit and so flatter it; "
                "prompts.%s.test.source names others",
                kind, kind,
            )  # fmt: skip
        elif part["seen"]:
            log.warning(
                "%d of %d test prompts that final scores of %s prompts are on were seen before, which flatters the "
                "edit; prompts.%s.test.source names others",
                part["seen"], part["prompts"], kind, kind,
            )  # fmt: skip
    log.info("final scores: %s", seconds)
