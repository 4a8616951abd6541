"""``task=benchmark``: the original and the exported model asked the same questions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from heretic_ds.checkpoint import bnb
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import holds_export
from heretic_ds.export.target import MANIFEST_NAME
from heretic_ds.fingerprint import identities
from heretic_ds.foreign.disk import write_atomically
from heretic_ds.foreign.reading import path_of, read_json, reading
from heretic_ds.harness.asking import HARNESS, Harness, Score, difference
from heretic_ds.job import Job
from heretic_ds.placements import build_engine, placements_of, settled_alone
from heretic_ds.report.benchmarks import benchmark_table
from heretic_ds.run_folder import BENCHMARKS_NAME
from heretic_ds.settings import Settings
from heretic_ds.stages.opening import export_dir, run_dir
from heretic_ds.stages.placing import settle_placements
from heretic_ds.world import World

log = logging.getLogger(__name__)

_ADVICE = "remove it, and the questions are asked anew"


def run_benchmarks(settings: Settings, world: World, console: Console) -> None:
    """Ask the models the tasks of ``benchmark.tasks`` one after another, and show their scores side by side.

    One model is in memory at a time. What a model answered is kept, so that the same command asks no model twice.
    Raises UserError before a model is loaded for what is missing.
    """
    models = world.decide(lambda: _models(settings))
    # One rank downloads what all will read.
    world.decide(lambda: Harness(settings.benchmark).load() and None, "reading the benchmarks' questions")
    harness = world.agree(lambda: Harness(settings.benchmark))
    tokens = world.agree(harness.answer_tokens, "reading the benchmarks' questions")
    file, scores = run_dir(settings) / BENCHMARKS_NAME, {}
    for name, path in models.items():
        asked = world.decide(lambda: _asked(settings, path))  # noqa: B023
        known = world.decide(lambda: _known(file, name, asked))  # noqa: B023
        if known is not None:
            log.info("%s holds the %s's scores already", file, name)
        else:
            log.info("asking the %s, %s", name, path)
            known = _scores_of(settings, path, tokens, harness, world)
            world.decide(lambda: _keep(file, name, asked, known))  # noqa: B023
        scores[name] = known
    console.print(benchmark_table(scores, max(20, console.width - 60)), no_wrap=True)
    world.decide(lambda: _keep_differences(file, scores))
    log.info("benchmarks are in %s", file)


def _models(settings: Settings) -> dict[str, str]:
    """Paths of the models to ask, by what they are. Raises UserError for an export that is not there."""
    folder, which = export_dir(settings), settings.benchmark.models
    if which != "original" and not holds_export(folder, "model"):
        raise UserError(
            f"{folder} holds no whole exported model to ask; give its folder as export.dir, or set "
            "benchmark.models=original"
        )
    models = {"original": settings.model.path, "export": str(folder)}
    return models if which == "both" else {which: models[which]}


def _scores_of(settings: Settings, path: str, tokens: int, harness: Harness, world: World) -> list[Score]:
    """A model's scores, alike on all ranks."""
    from heretic_ds.harness.model import EngineModel

    revision = settings.model.revision if path == settings.model.path else None
    settings = replace(
        settings,
        model=replace(settings.model, path=path, revision=revision),
        generation=replace(settings.generation, max_new_tokens=tokens),
    )
    settings = settled_alone(settings) if world.size == 1 else settings
    job = Job.check(settings, world, with_prompts=False)
    settle_placements(job, run_dir(settings))
    placement = placements_of(job.settings)["evaluate"]
    if not placement.in_process:
        raise UserError(
            f"evaluate={placement.name} keeps the model in another process, where the harness cannot ask it; set "
            "evaluate=replicated or another placement"
        )
    engine = build_engine(job, "evaluate")
    try:
        found = harness.ask(EngineModel(engine, job.chat, job.opened.config, tokens))
    finally:
        engine.close()
    return world.decide(lambda: found)


def _asked(settings: Settings, path: str) -> dict[str, Any]:
    """By which scores are known again: the questions and what asks them, the model, and what wrote it where it is an
    export."""
    manifest = path_of(path, "model.path") / MANIFEST_NAME
    written = read_json(manifest) if manifest.is_file() else {}
    model = {key: written.get(key) for key in ("run_id", "trial", "edit", "dtype")}
    given = {key: value for key, value in asdict(settings.benchmark).items() if key != "models"}
    folder, include, template = path_of(path, "model.path"), settings.benchmark.include, settings.prompts.template
    return {
        **given,
        "model": path,
        "revision": settings.model.revision,
        "dtype": settings.model.dtype,
        **({} if settings.model.quantization == bnb.NONE else {"quantization": settings.model.quantization}),
        "export": model,
        "files": identities(folder) if folder.is_dir() else None,
        "tasks_digest": include and _digest(path_of(include, "benchmark.include")),
        "template": template,
        "template_digest": None
        if template is None or "{" in template
        else _digest(path_of(template, "prompts.template")),
        "harness": version(HARNESS),
    }


def _digest(path: Path) -> str:
    """Of a file, or of all files in a folder, with their names; what Python makes of modules there does not count."""
    found = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        if file.is_file() and "__pycache__" not in file.parts:
            with reading(file, "give another one"), file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            found.update(f"{file.relative_to(path)} {content}\n".encode())
    return found.hexdigest()[:16]


def _known(file: Path, name: str, asked: dict[str, Any]) -> list[Score] | None:
    stored = read_json(file, _ADVICE) if file.is_file() else {}
    with reading(file, _ADVICE, "is damaged"):
        entry = stored.get(name)
        if entry is None or entry["asked"] != asked:
            return None
        return [Score(**{**score, "each": score["each"] and tuple(score["each"])}) for score in entry["scores"]]


def _keep(file: Path, name: str, asked: dict[str, Any], scores: Sequence[Score]) -> None:
    stored = read_json(file, _ADVICE) if file.is_file() else {}
    stored[name] = {"asked": asked, "scores": [asdict(score) for score in scores]}
    _write(file, stored)


def _keep_differences(file: Path, scores: dict[str, list[Score]]) -> None:
    stored = read_json(file, _ADVICE)
    stored["differences"] = []
    if len(scores) > 1:
        others = {score.key: score for score in scores["export"]}
        for score in scores["original"]:
            if (other := others.get(score.key)) is not None:
                change, error = difference(score, other)
                entry = dict(zip(("task", "metric", "filter"), score.key, strict=True))
                stored["differences"].append({**entry, "value": change, "error": error})
    _write(file, stored)


def _write(file: Path, stored: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(stored) + "\n")
