"""The folder a run works in: one process, one set of score-changing settings, files replaced atomically."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from heretic_ds.errors import UserError
from heretic_ds.fingerprint import LATER, completed, differences
from heretic_ds.foreign.disk import remove_unfinished, write_atomically, writing
from heretic_ds.foreign.reading import NOTHING, NUMBER, check_shape, read_json
from heretic_ds.foreign.text import printable

_LOCK = ".lock"
RESULTS_NAME, MEASURED_NAME, FINGERPRINT_NAME = "results.json", "measured.json", "fingerprint.json"
_DIRECTIONS = "directions.safetensors"
BENCHMARKS_NAME = "benchmark.json"
"""What ``task=benchmark`` writes, which may come before the run."""
_TOLD = 4
"""Differences of settings that are told one by one."""

_JOURNALS = ("study.journal.", "screening.journal.")
_SCORES: dict[str, Any] = {
    "refusals": (*NUMBER, NOTHING),
    "kl": (*NUMBER, NOTHING),
    "scores": {str: (*NUMBER, NOTHING)},
}
_RESULTS: dict[str, Any] = {
    "trials": [
        {**_SCORES, "index": int, "pass": int, "state": str, "profiles": {str: {str: NUMBER}}, "seconds": NUMBER},
    ],
    "pareto": [int],
    "selected": (int, NOTHING),
    "verified": (dict, NOTHING),
    "final": (dict, NOTHING),
    "baseline": (dict, NOTHING),
    "timings": {str: NUMBER},
    "prompts": {str: int},
}
_MEASURED: dict[str, Any] = {
    "batch_sizes": {str: {str: int}},
    "response_prefix": str,
    "trials_per_pass": int,
    "candidates_per_pass": int,
    "run_id": str,
    "placements": {"ranks": int, "device": str, "asked": {str: dict}, "chosen": {str: dict}, "why": str},
}
"""What a run writes to its files, and reads back: for :func:`heretic_ds.foreign.reading.check_shape`."""


class _LogFile(logging.FileHandler):
    """A log that never ends or disturbs what it tells of, also where the disk takes no more of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record without control characters: it holds texts of models, prompts and files."""
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """What the disk did not take is kept in memory, and written with what follows."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, whatever of it the disk takes."""
        with suppress(OSError):
            super().close()


class RunFolder:
    """An opened run folder; a context manager that holds the folder's lock until it is closed.

    Open it after validation and the model checks: opening creates the folder.
    """

    def __init__(self, path: Path, lock: IO[str], made: Sequence[Path] = (), fresh: bool = False) -> None:
        self.path = path
        self._made, self._fresh = made, fresh
        self._open = ExitStack()
        self._open.callback(lock.close)
        self._log: logging.Handler = logging.NullHandler()
        self.results = path / RESULTS_NAME
        self.journal = path / "study.journal"
        self.candidates = path / "screening.journal"
        self.directions = path / _DIRECTIONS
        self.config = path / "config.yaml"
        self.log = path / "run.log"
        self.front_plot = path / "pareto.png"
        self.report = path / "report.html"
        self.geometry = path / "geometry.json"
        self.artifacts = path / "artifacts"
        self._measured = path / MEASURED_NAME

    @classmethod
    def open(cls, path: Path | str, config: str | None, fingerprint: Mapping[str, Any]) -> RunFolder:
        """Create the folder or go on in it, and lock it.

        Args:
            path: the folder, with its parents created as needed.
            config: the composed configuration as YAML, kept as ``config.yaml``; None leaves that of the latest run.
            fingerprint: what :func:`fingerprint` returns.

        Raises:
            UserError: the path is no folder, holds other things, is in use by another process, was made with
                other settings (each difference is named), or cannot be written.
        """
        path = Path(path)
        _refuse_foreign(path)
        _refuse_other_settings(path, fingerprint)  # also before locking: a refused folder stays untouched
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        fresh = not (path / FINGERPRINT_NAME).exists()
        with writing(path, "run.dir"):
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / _LOCK).open("a+", encoding="utf-8")
        try:
            _acquire(lock, path)
            _refuse_other_settings(path, fingerprint)
            remove_unfinished(path, "run.dir")
            folder = cls(path, lock, made, fresh)
            if config is not None:
                write_atomically(folder.config, config)
            stored = json.dumps(dict(fingerprint), indent=1, sort_keys=True)
            write_atomically(path / FINGERPRINT_NAME, stored + "\n")
        except BaseException:
            lock.close()
            raise
        return folder

    def save_results(self, results: Mapping[str, Any], finished: Mapping[str, Any] | None = None) -> None:
        """Write ``results.json`` atomically.

        ``finished`` is what the run was asked for beyond its fingerprint (number of trials, export folder,
        ...), given when all of it is done; see :func:`finished_results`. Raises ValueError on NaN, which JSON does
        not have.
        """
        content = dict(results) if finished is None else {**results, "finished": dict(finished)}
        write_atomically(self.results, _in_lines(content) + "\n")

    def load_results(self) -> dict[str, Any] | None:
        """The results of the latest run in this folder; None where there are none yet. Raises UserError."""
        return read_results(self.path)

    @property
    def measured(self) -> dict[str, Any]:
        """What earlier runs found by measuring (batch sizes, response prefix, ...), to be used again."""
        return read_measured(self.path)

    def remember(self, **values: Any) -> None:
        """Add to :attr:`measured`, or replace in it; the file is written only where that changes it."""
        before = self.measured
        if (content := {**before, **values}) != before or not self._measured.exists():
            write_atomically(self._measured, json.dumps(content, indent=1) + "\n")

    def attach_log(self, logger: logging.Logger, earlier: Sequence[logging.LogRecord] = ()) -> None:
        """Append what was said ``earlier``, and what this logger and its children say until the folder is closed, to
        ``run.log``."""
        handler = self._open.enter_context(closing(_LogFile(self.log, encoding="utf-8")))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.setLevel(logging.INFO)
        logger.addHandler(handler)
        self._log = handler
        for record in earlier:
            handler.handle(record)
        self._open.callback(logger.removeHandler, handler)

    def write_log(self, text: str) -> None:
        """Append a line to ``run.log`` alone, once it is attached: what the terminal shows otherwise, or not at all."""
        line = " ".join(text.split())
        record = logging.LogRecord(__name__, logging.INFO, __file__, 0, line, None, None)
        self._log.handle(record)

    def close(self) -> None:
        """Let go of the log, and let other processes use the folder. Harmless when called again."""
        self._open.close()

    def discard(self) -> None:
        """Close the folder, and remove again what this run put there, where it was the first in it, but for directions
        and benchmarks.

        For a run that a mistake ended before its first trial: the mended command would be refused by what this one
        left. Directions and benchmarks, which may have taken hours, say by themselves what they were taken from. A
        folder inside, which is not a run's own, keeps it all.
        """
        self.close()
        if not self._fresh or any(entry.is_dir() for entry in self.path.iterdir()):
            return
        for file in self.path.iterdir():
            if file not in (self.directions, self.path / BENCHMARKS_NAME):
                file.unlink()
        for folder in self._made:
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_results(folder: Path) -> dict[str, Any] | None:
    """``results.json`` of a run folder; None where there is none. Raises UserError where it is not a run's own."""
    return _read_json(folder / RESULTS_NAME, "remove it, or give another run.dir", _RESULTS)


def read_measured(folder: Path) -> dict[str, Any]:
    """``measured.json`` of a run folder; empty where there is none. Raises UserError where it is not a run's own."""
    return _read_json(folder / MEASURED_NAME, "remove it", _MEASURED) or {}


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """``fingerprint.json`` of a run folder; None where there is none. Raises UserError where it is no such file."""
    return _read_json(folder / FINGERPRINT_NAME)


def finished_results(path: Path, fingerprint: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results of a folder in which all of ``request`` was done with these settings; does not open it."""
    try:
        results, stored = read_results(path), read_fingerprint(path)
    except (OSError, UserError):  # opening the folder will say it
        return None
    # The fingerprint lacks here what is found out only by reading the inputs.
    stored = None if stored is None else completed(stored, fingerprint)
    keys = {*fingerprint, *LATER}  # of those the ones that change nothing are left out
    same = stored is not None and all(stored.get(key) == fingerprint.get(key) for key in keys)
    return results if same and results is not None and results.get("finished") == request else None


def _read_json(file: Path, advice: str = "give another run.dir", shape: Any = dict) -> dict[str, Any] | None:
    """What a file of the folder holds; None where there is no such file. Raises UserError."""
    if not file.is_file():
        return None
    content = read_json(file, advice)
    check_shape(content, shape, str(file), advice)
    return content


def _refuse_foreign(path: Path) -> None:
    """A folder with anything but a run's own beginnings in it belongs to someone else."""
    if not path.exists():
        if path.is_symlink():
            raise UserError(
                f"run.dir={path} is a link that leads nowhere; make what it leads to, or set another run.dir"
            )
        return
    if not path.is_dir():
        raise UserError(f"run.dir={path} is a file, not a folder; set run.dir to a new or empty folder")
    names = {entry.name for entry in path.iterdir()}
    _refuse_ways_out(path, names)
    if FINGERPRINT_NAME in names:
        return
    # A run killed while it opened leaves its lock and perhaps config.yaml, one that a mistake ended its directions;
    # Hydra may write .hydra before.
    own = {_LOCK, ".hydra", "config.yaml", _DIRECTIONS, BENCHMARKS_NAME}
    foreign = sorted(name for name in names - own if not (name.startswith(".") and name.endswith(".tmp")))
    if foreign:
        raise UserError(
            f"run.dir={path} is not a run folder and not empty (it holds {foreign[0]}); "
            "set run.dir to a new or empty folder"
        )


def _refuse_ways_out(path: Path, names: Iterable[str]) -> None:
    """Where a file of the run is a link, a pipe or a device, what is written to it would arrive somewhere else, or
    nowhere. A folder may be a link: an export may lie on another disk."""
    for name in sorted(names):
        entry = path / name
        optunas = name.lstrip(".").startswith(_JOURNALS) and ".lock" in name  # a link that a kill may leave
        if not optunas and not entry.is_dir() and (entry.is_symlink() or not entry.is_file()):
            kind = "a link" if entry.is_symlink() else "no ordinary file"
            raise UserError(
                f"run.dir={path} holds {name}, which is {kind}; a run writes only to files of its own: move it away, "
                "or set another run.dir"
            )


def _refuse_other_settings(path: Path, fingerprint: Mapping[str, Any]) -> None:
    stored = read_fingerprint(path)
    stored = None if stored is None else completed(stored, fingerprint)
    if stored is not None and stored != fingerprint:
        told = differences(stored, fingerprint)
        more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        raise UserError(
            f"{path} holds a run with other settings: {'; '.join(told[:_TOLD])}{more}. "
            "Give another run.dir, or the same settings as before"
        )


def _acquire(lock: IO[str], path: Path) -> None:
    """Take the folder's lock, which the kernel releases with the process, however it ends."""
    try:
        taken = lock_descriptor(lock.fileno(), blocking=False)
    except OSError as error:
        raise UserError(
            f"the file system of run.dir={path} offers no file locks ({error.strerror}); "
            "set run.dir to a folder on another one"
        ) from error
    if not taken:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise UserError(
            f"the run folder {path} is in use by another process (pid {holder}); wait for it, or set another run.dir"
        )
    with writing(path, "run.dir"):
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()


def _in_lines(content: Mapping[str, Any]) -> str:
    """JSON with a line for every entry, and for every element of a list of objects, such as a trial.

    Written after every trial, and many times as fast as with an indentation of everything.
    """
    return "{\n" + ",\n".join(f" {json.dumps(str(key))}: {_value(value)}" for key, value in content.items()) + "\n}"


def _value(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "[\n  " + ",\n  ".join(json.dumps(each, allow_nan=False) for each in value) + "\n ]"
    return json.dumps(value, allow_nan=False)
