"""Hostile inputs, each put to the whole command in a copy of this process, which has the libraries loaded already.

A copy takes a hundredth of a second where the command takes two; whatever a case breaks, it breaks there.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heretic_ds import cli
from heretic_ds.settings import Settings
from heretic_ds.settings.checks import validate
from tests import families

KINDS = ("target.train", "target.eval", "baseline.train", "baseline.eval")
SECONDS = 20
"""Of processor time that a case may take."""


@dataclass
class Place:
    """A folder with a model, prompts and, where a case is about them, what an earlier run left."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def prompts(self, kind: str = "target.train", suffix: str = "txt") -> Path:
        return self.root / f"{kind}.{suffix}"

    def edit(self, name: str, **changes: Any) -> None:
        """Change fields of a JSON file of the model, or of the run; ``...`` removes one."""
        file = self.root / name
        content = json.loads(file.read_text())
        for key, value in changes.items():
            if value is ...:
                content.pop(key, None)
            else:
                content[key] = value
        file.write_text(json.dumps(content))


Spoil = Callable[[Place], None]


@dataclass(frozen=True)
class Case:
    """One hostile input: what is done to the folder, what is asked, and what has to be said."""

    name: str
    spoil: Spoil | None
    said: str
    """A part of the one line."""
    given: dict[str, Any] = field(default_factory=dict)
    """Settings by their names."""
    status: int = 2
    after_run: bool = False
    """Whether an earlier run was there, with two trials; then one more is asked for."""


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    status: int
    out: str
    err: str
    seconds: float
    """Of processor time."""


def prepare(folder: Path) -> None:
    """The model and the prompts that every case starts from."""
    families.save("llama", folder / "model", layers=4)
    numbers = random.Random(0)
    for kind in KINDS:
        words = ("cook", "bake", "roast") if kind.startswith("target") else ("sow", "plant", "water")
        lines = [f"{numbers.choice(words)} {numbers.choice(('plums', 'kale', 'a pear'))}, {n}" for n in range(8)]
        (folder / f"{kind}.txt").write_text("\n".join(lines) + "\n")


def settings_for(base: Settings, given: dict[str, Any]) -> Settings:
    """Settings of a case; relative paths are those of its folder."""
    settings = copy.deepcopy(base)
    usual: dict[str, Any] = {f"prompts.{kind}.source": f"{kind}.txt" for kind in KINDS}
    usual |= {
        f"prompts.{kind}.{key}": None if key == "slice" else "train" for kind in KINDS for key in ("split", "slice")
    }
    usual |= {
        "model.path": "model", "model.device": "cpu", "run.dir": "run", "prompts.response_prefix": "",
        "generation.max_new_tokens": 4, "generation.batch_size": 8, "scoring.markers": ["a", "e", "i"],
        "search.trials": 2, "search.startup_trials": 1, "search.trials_per_pass": "1", "export.max_kl": 50.0,
        "run.interactive": False, "direction.compare": None, "verify.final": False,
    }  # fmt: skip
    for name, value in (usual | given).items():
        *path, last = name.split(".")
        target: Any = settings
        for part in path:
            target = getattr(target, part)
        if not hasattr(target, last):
            raise KeyError(name)
        setattr(target, last, value)
    return settings


def command(settings: Settings) -> int:
    """What ``heretic-ds`` does once its settings are composed, which takes half a second for each command."""
    try:
        validate(settings)
        from heretic_ds import pipeline

        pipeline.run(settings)
        return 0
    except Exception as error:
        return cli.report(error)


class Copy:
    """A copy of this process at work in a folder; beside others where it has a name of its own."""

    def __init__(self, folder: Path, work: Callable[[], int], name: str = "") -> None:
        self._out, self._err = (folder.with_name(f"{folder.name}{name}.{kind}") for kind in ("out", "err"))
        self.pid = os.fork()
        if self.pid == 0:
            _begin(folder, self._out, self._err, work)

    def end(self) -> Ended:
        """Wait for it."""
        deadline = time.monotonic() + 6 * SECONDS
        while True:
            ended, status, usage = os.wait4(self.pid, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        out, err = (file.read_text("utf-8", "replace") for file in (self._out, self._err))
        return Ended(os.waitstatus_to_exitcode(status), out, err, usage.ru_utime + usage.ru_stime)


def run_in_copy(folder: Path, work: Callable[[], int]) -> Ended:
    """The status of ``work``, done by a copy of this process in a folder, and what it said."""
    return Copy(folder, work).end()


def _begin(folder: Path, out: Path, err: Path, work: Callable[[], int]) -> None:
    status = 99
    try:
        os.chdir(folder)
        for number, file in ((1, out), (2, err)):
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        if "datasets" in sys.modules:  # by another test's module, before the command could tell it to show no bars
            sys.modules["datasets"].disable_progress_bars()
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), "utf-8") for number in (1, 2))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = io.TextIOWrapper(io.FileIO(0), "utf-8")
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every ordinary file with its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink() and file.stat().st_size < 2**26
    }


def copy_of(source: Path, target: Path, with_run: bool) -> Place:
    """A folder of its own for a case."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=None if with_run else shutil.ignore_patterns("run"))
    return Place(target)
