"""Opening a run: inputs checked, run folder taken, engine built, results begun."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload
from uuid import uuid4

import torch
from omegaconf import OmegaConf
from rich.console import Console

from heretic_ds import progress
from heretic_ds.ablation import Ablation
from heretic_ds.checkpoint.fitness import dtype_name
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import holds_export
from heretic_ds.export.card import warn_of_terms
from heretic_ds.export.checkpoint import warn_of_strays
from heretic_ds.export.gguf import find_converter
from heretic_ds.export.target import MANIFEST_NAME, check_export_target
from heretic_ds.fingerprint import fingerprint
from heretic_ds.foreign.reading import path_of, read_json
from heretic_ds.job import Job
from heretic_ds.memory import peak_memory
from heretic_ds.placements import (
    Capturing,
    Engine,
    Evaluating,
    Placement,
    build_engine,
    left_open,
    placements_of,
    settled_alone,
)
from heretic_ds.planner import KeptBatches
from heretic_ds.report.command_line import hide_secrets
from heretic_ds.report.console import EarlierMessages
from heretic_ds.report.stages import STAGES, took
from heretic_ds.run_folder import FINGERPRINT_NAME, RESULTS_NAME, RunFolder, finished_results, read_measured
from heretic_ds.search.objective import Objective
from heretic_ds.search.trials import TrialRecord
from heretic_ds.settings import Settings
from heretic_ds.stages.facts import begun, held_in_words, in_lines, request
from heretic_ds.stages.placing import refuse_unverifiable_adapter, settle_placements, tell_of_nothing_to_share
from heretic_ds.stages.start import show_start, start_facts
from heretic_ds.world import World

if TYPE_CHECKING:
    from heretic_ds.stages.tracking import Following

log = logging.getLogger(__name__)


def run_dir(settings: Settings) -> Path:
    """The run folder: ``run.dir``, or ``runs/<model name>``, so that the same command finds its run again."""
    if settings.run.dir is not None:
        return path_of(settings.run.dir, "run.dir")
    name = path_of(settings.model.path.rstrip("/"), "model.path").name or "model"
    if settings.task.against is not None:
        return Path("runs") / f"{name}-against-{path_of(settings.task.against.rstrip('/'), 'evaluate.against').name}"
    return Path("runs") / (f"{name}-evaluate" if settings.task.name == "evaluate" else name)


def export_dir(settings: Settings) -> Path:
    """The export folder: ``export.dir``, or ``model`` in the run folder."""
    given = settings.export.dir
    return run_dir(settings) / "model" if given is None else path_of(given, "export.dir")


@dataclass
class Run:
    """One command at work: what every stage reads and adds to.

    Every rank has one and goes through the same stages; the run folder is rank 0's alone.
    """

    job: Job
    console: Console
    folder: RunFolder | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    """What earlier runs in this folder found by measuring: batch sizes by phase and by where the model lay, response
    prefix, trials per pass."""
    records: list[TrialRecord] = field(default_factory=list)
    """Finished trials, by index."""
    results: dict[str, Any] = field(default_factory=dict)
    following: Following | None = None
    """Those who follow the search beside the run folder; rank 0 alone has them."""
    earlier: dict[str, Any] | None = None
    """``results.json`` as an earlier run left it."""
    objective: Objective | None = None
    """What edits are scored by, once the original was measured."""
    _ablation: Ablation | None = None
    _engine: Engine | None = None
    _layout: tuple[type[Placement], Placement.Options] | None = None
    _kept: KeptBatches | None = None
    """What is known of batch sizes from other runs on this machine."""

    @property
    def settings(self) -> Settings:
        return self.job.settings

    @property
    def world(self) -> World:
        return self.job.world

    @property
    def scorer(self) -> str:
        """Name of the scorer that the search minimises."""
        return self.job.scorers[0].name

    @property
    def path(self) -> Path:
        """The run folder's path."""
        return run_dir(self.settings)

    @property
    def engine(self) -> Evaluating:
        """The engine that evaluates."""
        return self.lay_out("evaluate")

    @property
    def ablation(self) -> Ablation:
        """The directions and the form of this run's edits."""
        if self._ablation is None:
            raise RuntimeError("no stage has made the directions")
        return self._ablation

    def edit_along(self, ablation: Ablation) -> None:
        """Take the directions for every edit to come, in the engine that evaluates."""
        self._ablation = ablation
        self.engine.prepare(ablation)

    @overload
    def lay_out(self, phase: Literal["capture"]) -> Capturing: ...

    @overload
    def lay_out(self, phase: Literal["evaluate"]) -> Evaluating: ...

    def lay_out(self, phase: str) -> Any:
        """The engine of a phase. Where two phases are placed alike they share one; else the first one's memory is
        released before the second is built."""
        layouts = {name: placed.layout(self.world.size) for name, placed in placements_of(self.settings).items()}
        if self._engine is None or layouts[phase] != self._layout:
            self.close()
            with self.timed("load") as work:
                self._engine, self._layout = build_engine(self.job, phase), layouts[phase]
            self.results["dtype"] = dtype_name(self._engine.dtype)  # the first of several may not have run
            log.info("loaded in %s: %s", held_in_words(self.job, self.results["dtype"]), took(work))
            for name, layout in layouts.items():
                if layout == self._layout:
                    self.results["world"][name]["degree"] = self._engine.degree
            self._kept = KeptBatches(self.job, self._engine, self._layout).used()
            self._use_measured_batch_sizes()
        return self._engine

    def use_measured(self, measured: dict[str, Any]) -> None:
        """Take what earlier runs in this folder found by measuring."""
        self.measured = measured
        self._use_measured_batch_sizes()

    def _use_measured_batch_sizes(self) -> None:
        if self._kept is not None and not self.settings.generation.batch_size:  # one that the user gives counts
            self._kept.prefer(self.measured.get("batch_sizes", {}).get(self._where, {}))

    @property
    def _where(self) -> str:
        """On what the model lies now: what is a good batch size there is none elsewhere."""
        if self._engine is None or self._layout is None:
            return ""
        device = self.job.opened.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{self._layout[0].name}, {self._engine.degree} of {self.world.size} ranks, {name}"

    def close(self) -> None:
        """Release the model."""
        if self._engine is not None:
            with progress.work("releasing the model"):
                self._engine.close()
        self._engine = self._layout = self._kept = None

    @contextmanager
    def timed(self, phase: str) -> Iterator[progress.Work]:
        """A stage: it is shown while the block lasts, and the seconds that it takes are added to ``timings``."""
        with progress.work(STAGES[phase]) as work:
            try:
                yield work
            finally:
                timings = self.results["timings"]
                timings[phase] = round(timings.get(phase, 0.0) + time.monotonic() - work.started, 3)

    def remember(self, **values: Any) -> None:
        """Keep what was measured, and the batch sizes, for later runs in this folder."""
        sizes = dict(self.measured.get("batch_sizes", {}))
        if self._engine is not None:
            sizes[self._where] = dict(self._engine.batch_sizes)
        if sizes != self.measured.get("batch_sizes", {}) and self.folder is not None:
            self.folder.write_log(f"batch sizes: {sizes.get(self._where, {})}")
        self.measured.update(values, batch_sizes=sizes)
        if self.folder is not None:
            self.folder.remember(**self.measured)
            if self._kept is not None:
                self._kept.keep()

    def save(self, finished: bool = False) -> None:
        """Write ``results.json`` as it stands. Every rank takes part: each has a peak of memory to tell."""
        peaks = self.world.gather(peak_memory())
        self.results["peak_memory_bytes"] = {kind: [peak[kind] for peak in peaks] for kind in ("host", "device")}
        self.remember()
        self.results["batch_sizes"] = self.measured["batch_sizes"]
        self.results["response_prefix"] = self.job.chat.response_prefix
        if self.folder is not None:
            asked = request(self.settings, export_dir(self.settings)) if finished else None
            self.folder.save_results(self.results, asked)


def already_finished(settings: Settings, world: World) -> dict[str, Any] | None:
    """The results of an earlier run that did all that this command asks for; None where something is left to do."""
    results = world.decide(lambda: _finished(settings))
    if results is None or not world.decide(lambda: _holds_own_export(settings)):
        return None
    log.info("%s is finished: see %s; nothing was done", run_dir(settings), run_dir(settings) / RESULTS_NAME)
    return results


def _finished(settings: Settings) -> dict[str, Any] | None:
    return finished_results(run_dir(settings), fingerprint(settings), request(settings, export_dir(settings)))


def _holds_own_export(settings: Settings) -> bool:
    """Whether the export folder holds a whole model that this run folder's own search wrote."""
    return _own_manifest(settings) is not None and holds_export(export_dir(settings), settings.export.format)


def _own_manifest(settings: Settings) -> dict[str, Any] | None:
    """The manifest in the export folder, where this run folder's own search wrote it."""
    file = export_dir(settings) / MANIFEST_NAME
    if not file.is_file() or (run_id := read_measured(run_dir(settings)).get("run_id")) is None:
        return None
    written = read_json(file)
    return written if written.get("run_id") == run_id else None


def refuse_used_export_folder(settings: Settings, world: World) -> None:
    """Find out before the search that the model cannot be written after it."""
    world.decide(lambda: _refuse_used_export_folder(settings))


def _refuse_used_export_folder(settings: Settings) -> None:
    target, folder = export_dir(settings).resolve(), run_dir(settings).resolve()
    if target == folder or target in folder.parents:
        raise UserError(f"export.dir={target} holds the run folder {folder}; choose another export.dir")
    check_export_target(target, may_replace(settings))


def may_replace(settings: Settings) -> bool:
    """Whether what the export folder holds may give way: because ``export.overwrite`` says so, or because this run
    folder's own search wrote it, which now goes on, or is asked for the same trial once more."""
    if settings.export.overwrite or (written := _own_manifest(settings)) is None:
        return settings.export.overwrite
    trial = settings.export.trial
    return settings.task.name == "abliterate" or (trial is not None and trial == written.get("trial"))


@contextmanager
def opened(settings: Settings, world: World, console: Console) -> Iterator[Run]:
    """Check all inputs, then take the run folder. A new one is made only after the model was loaded and found sound."""
    with ExitStack() as stack, EarlierMessages(logging.getLogger("heretic_ds")) as earlier:
        alone = "since there is one rank" if world.size == 1 and left_open(settings) else "as given"
        settings = settled_alone(settings) if world.size == 1 else settings
        world.agree(lambda: placements_of(settings))
        with progress.work("opening"):
            job = Job.check(settings, world)
            world.decide(lambda: _refuse_impossible_export(job))
        show_start(console, start_facts(job, run_dir(settings)))
        with progress.work("opening"):
            placed = settle_placements(job, run_dir(settings), alone)
        refuse_unverifiable_adapter(job)
        tell_of_nothing_to_share(job)
        run = Run(job, console, results=begun(job))
        stack.callback(run.close)
        if not world.decide(lambda: (run_dir(settings) / FINGERPRINT_NAME).exists()):
            run.lay_out("capture")
        world.decide(lambda: _take_folder(run, stack, earlier.records))
        earlier.end()
        run.use_measured(world.decide(lambda: run.folder.measured if run.folder is not None else {}))
        if placed:
            run.remember(**placed)
        _add_earlier_timings(run)
        try:
            yield run
            if run.following is not None:
                run.following.end()
                run.following = None
        except UserError:
            if run.folder is not None and not run.records:
                run.folder.discard()
            raise
        finally:
            if run.following is not None:
                run.following.interrupted()


def _take_folder(run: Run, stack: ExitStack, earlier: Sequence[logging.LogRecord]) -> None:
    searches = run.settings.task.name in ("abliterate", "evaluate") or not (run.path / FINGERPRINT_NAME).exists()
    # Shown in report.html, and sent to trackers.
    config = hide_secrets(OmegaConf.to_yaml(OmegaConf.structured(run.settings))) if searches else None
    known = fingerprint(run.settings, **run.job.inputs())
    run.folder = stack.enter_context(RunFolder.open(run.path, config, known))
    run.folder.attach_log(logging.getLogger("heretic_ds"), earlier=earlier)
    for line in in_lines(run.results):
        run.folder.write_log(line)
    if "run_id" not in run.folder.measured:
        run.folder.remember(run_id=uuid4().hex)  # by which the run knows its own export again


def earlier_outcome(run: Run) -> dict[str, Any]:
    """What the folder's latest search run selected and verified, and whether it was finished."""
    kept = ("selected", "verified", "final", "examples", "agreement", "finished")
    return {key: value for key, value in (run.earlier or {}).items() if key in kept}


def _add_earlier_timings(run: Run) -> None:
    """Seconds that a search took before it was interrupted count too."""
    run.earlier = stored = run.world.decide(lambda: run.folder.load_results() if run.folder is not None else None)
    if stored is not None and run.settings.task.name == "abliterate":
        timings = run.results["timings"]
        for phase, seconds in stored.get("timings", {}).items():
            timings[phase] = round(timings.get(phase, 0.0) + seconds, 3)


def _refuse_impossible_export(job: Job) -> None:
    """The disk is too small for the model, or its own folder is to be written over."""
    settings, target, replace = job.settings, export_dir(job.settings), may_replace(job.settings)
    kept = target.exists() and not replace  # by a menu, which asks for a folder
    if settings.task.name in ("abliterate", "export") and not kept:
        size = sum(math.prod(info.shape) for info in job.opened.headers.values()) * job.opened.dtypes[0].itemsize
        size = 0 if settings.export.format == "adapter" else size
        if settings.export.gguf:
            find_converter()
        check_export_target(target, replace, source=job.opened.source.folder, needed_bytes=size)
        warn_of_terms(job.opened.source.folder)
        warn_of_strays(job.opened.source.folder)
