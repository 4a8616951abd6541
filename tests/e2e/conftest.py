"""The command as its users meet it: tiny models and prompts on disk, and ways to run it in this process and outside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from heretic_ds import cli
from tests import families
from tests.conftest import ROOT

NEW_TOKENS = 12
SIZES = {"target.train": 18, "target.eval": 14, "baseline.train": 17, "baseline.eval": 11}
_OPENINGS = {"target": ("cook", "bake", "roast", "boil"), "baseline": ("sow", "plant", "water", "prune")}
_THINGS = ("plums", "leeks in May", "a pear", "beans and dill", "kale", "cherries with thyme")


@dataclass
class Material:
    """A folder of prompt files and tiny models, shared by all tests, which leave it as it is."""

    folder: Path
    prompts: dict[str, list[str]]
    """By kind and part: ``target.train``."""

    def model(self, family: str, **options: Any) -> Path:
        """A saved random model of 4 layers, made once."""
        options = {"layers": 4, **options}
        path = self.folder / "-".join([family, *(f"{key}{value}" for key, value in sorted(options.items()))])
        return path if path.exists() else families.save(family, path, **options)

    def prompt_file(self, name: str) -> Path:
        return self.folder / f"{name}.txt"

    def words(self, model: Path | str, *more: str) -> list[str]:
        """A command line on these prompts, small and reproducible; later words override earlier ones."""
        given = {word.split("=", 1)[0] for word in more}
        usual = [
            *(f"prompts.{name}.source={self.prompt_file(name)}" for name in SIZES),
            *(f"prompts.{name}.{key}" for name in SIZES for key in ("slice=null", "split=train")),
            "prompts.response_prefix=",
            "model.device=cpu",
            f"generation.max_new_tokens={NEW_TOKENS}",
            "generation.batch_size=5",
            "scoring.markers=[a,e,i]",
            "search.trials=6",
            "search.startup_trials=3",
            "export.max_kl=50",
            "verify.final=false",  # test_final_scores.py is about these
        ]
        return [str(model), *(word for word in usual if word.split("=", 1)[0] not in given), *more]


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("material")
    random_numbers = random.Random(0)
    prompts = {}
    for name, size in SIZES.items():
        openings = _OPENINGS[name.split(".")[0]]
        prompts[name] = [
            f"{random_numbers.choice(openings)} {random_numbers.choice(_THINGS)}, {number}" for number in range(size)
        ]
        (folder / f"{name}.txt").write_text("\n".join(prompts[name]) + "\n")
    return Material(folder, prompts)


@dataclass
class Outcome:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


Heretic = Callable[..., Outcome]


@pytest.fixture
def heretic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Heretic:
    """`heretic("model", "search.trials=5")`: the command in this process, started in the test's own folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | os.PathLike[str]) -> Outcome:
        capsys.readouterr()
        status = cli.main([os.fspath(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


class Started:
    """The real command in a process group of its own."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self.cwd = cwd
        self.output = (cwd / f"output-{time.monotonic_ns()}.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "heretic_ds", *words],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self) -> str:
        return Path(self.output.name).read_text()

    def wait_until(self, happened: Callable[[], bool], timeout: float = 300) -> None:
        """Fails where the command ends before that happens, or takes too long."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, f"it ended too early:\n{self.said()}"
            assert time.monotonic() < deadline, f"it took too long:\n{self.said()}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def end(self, timeout: float = 300) -> int:
        status = self.process.wait(timeout)
        self.output.close()
        return status


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], Started]]:
    """`start(words)`: the command in the background; whatever still runs at the test's end is killed."""
    all_started: list[Started] = []

    def begin(words: list[str]) -> Started:
        all_started.append(Started(words, tmp_path))
        return all_started[-1]

    yield begin
    for started in all_started:
        if started.process.poll() is None:
            started.send(signal.SIGKILL)
            started.end()


def read_results(run_dir: Path | str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(run_dir) / "results.json").read_text())
    return content


def outcome_of(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the trials has to repeat: everything but how long they took."""
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in trials]


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and the moment it was last written."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
