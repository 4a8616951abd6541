"""Opening a run: inputs checked, run folder taken, engine built, results begun."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from heretic_ds.engines import Engine
from heretic_ds.engines.memory import peak_memory
from heretic_ds.export.checkpoint import model_bytes
from heretic_ds.export.manifest import package_versions
from heretic_ds.export.target import MANIFEST_NAME, check_export_target
from heretic_ds.job import Job
from heretic_ds.model_source import read_json
from heretic_ds.run_folder import RunFolder, fingerprint, finished_results
from heretic_ds.settings import Settings

log = logging.getLogger(__name__)

SCHEMA = 1


def run_dir(settings: Settings) -> Path:
    """The run folder: ``run.dir``, or ``runs/<model name>``, so that the same command finds its run again."""
    if settings.run.dir is not None:
        return Path(settings.run.dir).expanduser()
    name = Path(settings.model.path.rstrip("/")).expanduser().name or "model"
    return Path("runs") / (f"{name}-evaluate" if settings.task.name == "evaluate" else name)


def export_dir(settings: Settings) -> Path:
    """The export folder: ``export.dir``, or ``model`` in the run folder."""
    return run_dir(settings) / "model" if settings.export.dir is None else Path(settings.export.dir).expanduser()


def request(settings: Settings) -> dict[str, Any]:
    """What a command asks for beyond the settings that a run folder is bound to."""
    return {
        "task": settings.task.name,
        "trials": settings.search.trials,
        "export": {
            "dir": str(export_dir(settings)),
            "trial": settings.export.trial,
            "max_kl": settings.export.max_kl,
        },
    }


@dataclass
class Run:
    """One command at work: what every stage reads and adds to."""

    settings: Settings
    job: Job
    folder: RunFolder
    engine: Engine
    console: Console
    results: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``timings``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            timings = self.results["timings"]
            timings[phase] = round(timings.get(phase, 0.0) + time.perf_counter() - started, 3)

    def save(self, finished: bool = False) -> None:
        """Write ``results.json`` as it stands, and what was measured for the next run in this folder."""
        peak = peak_memory()
        self.results["peak_memory_bytes"] = {kind: [number] for kind, number in peak.items()}
        self.folder.remember(batch_sizes=self.engine.batch_sizes)
        self.folder.save_results(self.results, request(self.settings) if finished else None)


def already_finished(settings: Settings) -> dict[str, Any] | None:
    """The results of an earlier run that did all that this command asks for; None where something is left to do."""
    results = finished_results(run_dir(settings), fingerprint(settings), request(settings))
    if results is None or not (export_dir(settings) / MANIFEST_NAME).is_file():
        return None
    log.info("%s is finished: see %s; nothing was done", run_dir(settings), run_dir(settings) / "results.json")
    return results


def refuse_used_export_folder(settings: Settings) -> None:
    """Find out before the search that the model cannot be written after it.

    A folder that this run itself wrote, and was killed before it could say so, is fine.
    """
    target = export_dir(settings)
    results, manifest = run_dir(settings) / "results.json", target / MANIFEST_NAME
    if manifest.is_file() and results.is_file():
        outcome, written = read_json(results), read_json(manifest)
        unfinished = "finished" not in outcome and outcome.get("verified") is not None
        if unfinished and outcome["verified"] == written.get("verified") and outcome["selected"] == written["trial"]:
            return
    check_export_target(target, settings.export.overwrite)


@contextmanager
def opened(settings: Settings, console: Console) -> Iterator[Run]:
    """Check all inputs, then take the run folder and lay the model out. Nothing is written before the checks passed."""
    started = time.perf_counter()
    job = Job.check(settings)
    _refuse_impossible_export(job)
    config = OmegaConf.to_yaml(OmegaConf.structured(settings))
    with RunFolder.open(run_dir(settings), config, fingerprint(settings)) as folder:
        folder.attach_log(logging.getLogger("heretic_ds"))
        log.info("%s: %s", job.loaded.model_name, job.anatomy.summary())
        engine = job.engine(folder.measured.get("batch_sizes", {}))
        run = Run(settings, job, folder, engine, console, _begun(settings, job))
        run.results["timings"]["load"] = round(time.perf_counter() - started, 3)
        try:
            yield run
        finally:
            engine.close()


def _refuse_impossible_export(job: Job) -> None:
    """What only a loaded model tells: the disk is too small for it, or its own folder is to be written over."""
    settings, target = job.settings, export_dir(job.settings)
    kept = target.exists() and not settings.export.overwrite  # an earlier export, or a menu that asks for a folder
    if settings.task.name in ("abliterate", "export") and not kept:
        size = model_bytes(job.loaded.model)
        check_export_target(target, settings.export.overwrite, source=job.loaded.source, needed_bytes=size)


def _begun(settings: Settings, job: Job) -> dict[str, Any]:
    """``results.json`` before anything was measured."""
    return {
        "schema": SCHEMA,
        "task": settings.task.name,
        "model": settings.model.path,
        "world": {
            "size": 1,
            "capture": {"placement": settings.capture.placement, "degree": settings.capture.degree or 1},
            "evaluate": {"placement": settings.evaluate.placement, "degree": settings.evaluate.degree or 1},
        },
        "prompts": {f"{kind}_eval": len(job.texts[f"{kind}.eval"]) for kind in ("target", "baseline")},
        "baseline": None,
        "trials": [],
        "pareto": [],
        "selected": None,
        "verified": None,
        "timings": dict.fromkeys(("load", "capture", "search", "verify", "export"), 0.0),
        "versions": package_versions(),
    }
