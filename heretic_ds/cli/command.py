"""The command line: composes the configuration with Hydra, checks it, and hands it to the pipeline.

Torch and everything that imports it is loaded only once a job starts, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra import version as hydra_version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heretic_ds.cli.errors import explain, unknown_keys
from heretic_ds.cli.help import NO_MODEL, in_our_spelling
from heretic_ds.cli.interrupts import interrupts_heeded, was_interrupted
from heretic_ds.errors import RankFailed, SearchFailed, UserError
from heretic_ds.foreign.libraries import quiet_libraries
from heretic_ds.foreign.reading import reason
from heretic_ds.foreign.text import printable
from heretic_ds.foreign.ulimits import limit_reached
from heretic_ds.launching import own_ranks, rank_guard
from heretic_ds.report import command_line, sweep_summary
from heretic_ds.report.stages import starting
from heretic_ds.settings import TASKS, Settings, conf_dir, register_schemas
from heretic_ds.settings.checks import validate

Objective = tuple[float, float]
"""What a sweep minimises: the verified (refusal rate, KL divergence in nats)."""

CONFIG_NAME, VERSION_BASE = "config", "1.3"
COMPOSITION_ERRORS = HydraException | OmegaConfBaseException | yaml.YAMLError
_IN_VAIN = re.compile("timed out (waiting|after)", re.IGNORECASE)
"""What a collective says that has come to its timeout."""
EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str]) -> int:
    """Runs the command that these words are; returns the exit status."""
    try:
        with interrupts_heeded():
            if said := in_our_spelling(arguments):
                raise UserError(said)
            if arguments[:1] == ["reproduce"]:
                from heretic_ds.stages.sharing.reproducing import reproduce

                return 0 if reproduce(arguments[1:]) else EXIT_FAILED
            with quiet_libraries():  # also while they are imported
                return _run(arguments)
    except (KeyboardInterrupt, Exception) as error:
        return _say("heretic-ds: interrupted", EXIT_INTERRUPTED) if was_interrupted(error) else report(error)


def report(error: BaseException) -> int:
    """Tells the user about an error, in one line where the user can mend it, and returns its exit status."""
    status = EXIT_USER_ERROR if isinstance(error, UserError | COMPOSITION_ERRORS) else EXIT_FAILED
    if isinstance(error, UserError | SearchFailed | COMPOSITION_ERRORS):
        return _say(f"heretic-ds: {_in_one_line(error)}", status)
    if limit := limit_reached(error):
        return _say(f"heretic-ds: {limit}", EXIT_USER_ERROR)
    if "RANK" in os.environ and isinstance(error, RuntimeError) and _IN_VAIN.search(str(error)):
        told = (
            f"heretic-ds: rank {os.environ['RANK']} waited for another rank for as long as it may: that one hangs, is "
            "stopped, or has died"
        )
        return _say(told, status, shared=False)
    told = str(error) if isinstance(error, RankFailed) else "".join(traceback.format_exception(error)).rstrip()
    return _say(told, status, shared=False)


def compose(words: Sequence[str]) -> Settings:
    """Settings as the command line makes them from a model and overrides, without running anything.

    Raises UserError, and what Hydra and OmegaConf raise (COMPOSITION_ERRORS).
    """
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE, job_name="heretic_ds"):
        return to_settings(hydra_compose(CONFIG_NAME, overrides=expand_model(words)))


def to_settings(config: DictConfig) -> Settings:
    """A composed configuration as checked settings. Raises UserError."""
    if OmegaConf.is_missing(config.model, "path"):
        raise UserError(NO_MODEL)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is not set; add {missing[0]}=...")
    for unknown in unknown_keys(config):
        raise UserError(unknown)
    settings = OmegaConf.to_object(config)
    if not isinstance(settings, Settings):
        raise UserError(
            "the configuration does not start from the schema; --config-name has to name a file like config"
        )
    validate(settings)
    with _imports("heretic_ds.stages.placing"):
        from heretic_ds.placements import placements_of  # their classes import torch
        from heretic_ds.stages.placing import described_machine

    placements_of(settings)
    described_machine(settings)
    return settings


@dataclass
class _Job:
    """What Hydra calls, once for a single run and once per job of a sweep, and how the single run ended."""

    words: Sequence[str]
    """The command line."""
    started: bool = False
    error: BaseException | None = None
    status: int = 0
    """Of ranks that were started for the single run."""

    def __call__(self, config: DictConfig) -> Objective | None:
        self.started = True
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return sweep_job(config, _dispatch_here)
        try:
            with starting():
                settings = to_settings(config)
            return self._run(settings)
        except Exception as error:  # reported by main, without the lines that Hydra would add
            self.error = error
            return None

    def _run(self, settings: Settings) -> Objective | None:
        command_line.note(self.words)
        if ranks := own_ranks.ranks_to_start(settings):
            self.status = own_ranks.start_ranks(settings, self.words, ranks)
            return None
        if told := own_ranks.advice(settings, self.words):
            print(told, flush=True)
        return _dispatch(settings)


def _run(arguments: Sequence[str]) -> int:
    parser = get_args_parser()
    options = _parse(parser, arguments)
    if options.multirun and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "--multirun inside ranks would run every job on every rank by itself; start one process, "
            "heretic-ds --multirun hydra/launcher=deepspeed ..., which starts the ranks of each job"
        )
    options.overrides = expand_model(options.overrides)
    hydra_version.setbase(VERSION_BASE)
    register_schemas()
    job, sweep_summary.failed_jobs = _Job(arguments), 0
    try:
        with _hydra_errors_raised():
            _run_hydra(options, parser, job, config_path=str(conf_dir()), config_name=CONFIG_NAME)
    except ValueError as error:
        if job.started:
            raise
        raise UserError(reason(error)) from error  # Hydra's word on flags that exclude one another
    if job.error is not None:
        raise job.error
    return job.status or (EXIT_FAILED if sweep_summary.failed_jobs else 0)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags, with overrides allowed before, between and after them."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; heretic-ds --help shows the usage")

    parser.error = refuse  # type: ignore[method-assign]  # argparse itself would print its usage and exit
    return parser.parse_intermixed_args(arguments)


def expand_model(words: Sequence[str]) -> list[str]:
    """Overrides, with the one word that is none, the model, as `model.path=`. Raises UserError."""
    bare = [word for word in words if "=" not in word and not word.startswith(("+", "~"))]
    if len(bare) > 1:
        raise UserError(f"unexpected argument {bare[1]!r} after the model {bare[0]!r}; write overrides as key=value")
    if bare and bare[0] in TASKS and not Path(bare[0]).exists():
        raise UserError(f"{bare[0]!r} is a task, not a model; write heretic-ds <model> task={bare[0]}")
    words = [f"model.path={_quoted(word)}" if word in bare else word for word in words]
    # The group evaluate is a placement's, whose options know nothing of tasks.
    return [
        f"task.{word.removeprefix('evaluate.')}" if word.startswith("evaluate.against=") else word for word in words
    ]


def _quoted(text: str) -> str:
    """Any text as a quoted value of Hydra's grammar, where a backslash counts only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def _dispatch_here(settings: Settings) -> Objective | None:
    """One job of a sweep in this process."""
    if own_ranks.ranks_to_start(settings):
        raise UserError(
            f"run.launch={settings.run.launch} is for a single run; ranks for each job of a sweep are started by "
            "hydra/launcher=deepspeed"
        )
    return _dispatch(settings)


def _dispatch(settings: Settings) -> Objective | None:
    """Runs the task. Torch and transformers are imported here and not earlier."""
    with _imports("heretic_ds.pipeline"):
        from heretic_ds import pipeline

    atexit.register(gc.freeze)  # else Python looks through all of these modules once more at its end: a silent second
    return pipeline.run(settings)


@contextmanager
def _imports(module: str) -> Iterator[None]:
    """Import a module that brings thousands of others, while Python collects no garbage.

    All that these make stays: to look through it again and again, as it grows, takes a sixth of the imports' time, and
    later collections would look through it as well. Nothing is done where the module is there already.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def sweep_job(config: DictConfig, dispatch: Callable[[Settings], Objective | None]) -> Objective | None:
    """One job of a sweep: whatever goes wrong becomes a row of the summary, and the sweep goes on.

    The run folder is the job's own folder in the sweep's, unless the command line names another. No job ends
    with a menu, which would keep the next from starting. What a failed job returns is (nan, nan).
    """
    hydra = HydraConfig.get()
    if not any(override.lstrip("+").startswith("run.dir=") for override in hydra.overrides.task):
        config.run.dir = os.path.relpath(hydra.runtime.output_dir)
    config.run.interactive = False
    command_line.note(hydra.overrides.task)
    status, message, objective = 0, None, None
    try:
        objective = dispatch(to_settings(config))
    except (Exception, SystemExit) as error:
        status, objective = report(error), (math.nan, math.nan)
        message = _in_one_line(error)
    sweep_summary.record(hydra, config.run.dir, status, objective, message)
    return objective


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, COMPOSITION_ERRORS):
        return explain(error)
    expected = isinstance(error, UserError | SearchFailed)
    text = str(error) if expected else traceback.format_exception_only(error)[-1]
    return " ".join(text.split())


@contextmanager
def _hydra_errors_raised() -> Iterator[None]:
    """While open, Hydra raises its errors instead of printing them and exiting with status 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _say(text: str, status: int, shared: bool = True) -> int:
    """Tells the user how this process ends, on stderr unless the launcher of ranks will; returns the status."""
    text = printable(text)
    if not rank_guard.leave_word(text, status, shared):
        print(text, file=sys.stderr)
    return status
