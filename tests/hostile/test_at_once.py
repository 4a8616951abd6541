"""Commands that meet: two in one run folder, two with one export folder, good and bad jobs in one sweep."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heretic_ds import cli
from heretic_ds.settings import Settings
from tests.hostile.harness import KINDS, Copy, Place, command, copy_of, files_below, run_in_copy, settings_for


@pytest.fixture
def here(untouched: Path) -> Place:
    """A folder with a model and prompts."""
    return copy_of(untouched, untouched.with_name("case"), with_run=False)


class Held:
    """A run that stands still after its first pass until it is let go."""

    def __init__(self, place: Place, base: Settings, **given: Any) -> None:
        self._reached, self._go = place.root.with_name("reached"), place.root.with_name("go")
        for file in (self._reached, self._go):
            file.unlink(missing_ok=True)
        self.copy = Copy(place.root, lambda: self._work(settings_for(base, given)), "-held")
        deadline = time.monotonic() + 60
        while not self._reached.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _work(self, settings: Settings) -> int:
        from heretic_ds.search import loop

        tell = loop._tell

        def waiting(*given: Any) -> Any:
            self._reached.touch()
            while not self._go.exists():
                time.sleep(0.01)
            return tell(*given)

        loop._tell = waiting
        return command(settings)

    def let_go(self) -> None:
        self._go.touch()


@pytest.fixture
def held(here: Place, base: Settings) -> Iterator[Held]:
    run = Held(here, base, **{"export.dir": "out"})
    yield run
    run.let_go()


def test_two_runs_in_one_folder(held: Held, here: Place, base: Settings) -> None:
    """The second says who works there, in one line, and touches nothing; the first goes on."""
    before = files_below(here.root)
    second = run_in_copy(here.root, lambda: command(settings_for(base, {"export.dir": "other"})))
    assert second.status == 2, second.err
    [line] = second.err.splitlines()
    assert line == (
        f"heretic-ds: the run folder run is in use by another process (pid {held.copy.pid}); wait for it, or set "
        "another run.dir"
    )
    assert files_below(here.root) == before
    held.let_go()
    first = held.copy.end()
    assert first.status == 0 and first.err == "", first.err
    assert len(json.loads((here.run / "results.json").read_text())["trials"]) == 2


def test_two_runs_with_one_export_folder(held: Held, here: Place, base: Settings) -> None:
    """The one that comes second says so after its search, which is kept; what the other wrote stays."""
    other = run_in_copy(here.root, lambda: command(settings_for(base, {"run.dir": "run2", "export.dir": "out"})))
    assert other.status == 0, other.err
    before = files_below(here.root / "out")
    held.let_go()
    ended = held.copy.end()
    assert ended.status == 2, ended.out
    [line] = ended.err.splitlines()
    assert "export.dir=" in line and "exists and is not empty" in line
    assert files_below(here.root / "out") == before
    assert len(json.loads((here.run / "results.json").read_text())["trials"]) == 2
    again = run_in_copy(here.root, lambda: command(settings_for(base, {"export.dir": "elsewhere"})))
    assert again.status == 0 and "2 of 2 trials are done already" in again.out, again.err


def words() -> list[str]:
    """A small run's overrides."""
    return [
        *(f"prompts.{kind}.source={kind}.txt" for kind in KINDS),
        *(f"prompts.{kind}.{key}" for kind in KINDS for key in ("slice=null", "split=train")),
        "prompts.response_prefix=", "model.device=cpu", "generation.max_new_tokens=4", "generation.batch_size=8",
        "scoring.markers=[a,e,i]", "search.trials=2", "search.startup_trials=1", "search.trials_per_pass=1",
        "export.max_kl=50",
    ]  # fmt: skip


def test_bad_jobs_of_a_sweep_lose_nothing_of_the_others(here: Place) -> None:
    """Each is a line and a row, the good ones come to what they come to alone, and the status says that some failed."""
    shutil.copytree(here.model, here.root / "broken")
    (here.root / "broken" / "model.safetensors").write_bytes(b"x" * 100)
    shutil.copytree(here.model, here.root / "other")
    jobs = ("broken", "model", "nowhere", "target.eval.txt", "other")
    sweep = ["-m", f"model.path={','.join(jobs)}", "hydra.sweep.dir=sweep"]
    ended = run_in_copy(here.root, lambda: cli.main([*words(), *sweep]))
    told = f"{ended.out[-3000:]}\n{ended.err[-4000:]}"
    assert ended.status == 1, told
    assert len(ended.err.splitlines()) == 3 and "Traceback" not in ended.err, told
    assert all(line.startswith("heretic-ds: ") for line in ended.err.splitlines()), told
    rows = [json.loads(line) for line in (here.root / "sweep" / "summary.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == [2, 0, 2, 2, 0]
    assert "5 jobs, 3 failed" in ended.out
    alone = run_in_copy(here.root, lambda: cli.main(["model", *words(), "run.dir=alone", "run.interactive=false"]))
    assert alone.status == 0, alone.err
    expected = trials(here.root / "alone")
    for number in (1, 4):
        assert trials(here.root / "sweep" / str(number)) == expected
        model = here.root / "sweep" / str(number) / "model" / "model.safetensors"
        assert model.read_bytes() == (here.root / "alone" / "model" / "model.safetensors").read_bytes()
    for number in (0, 2, 3):
        assert not (here.root / "sweep" / str(number)).exists() or not list((here.root / f"sweep/{number}").iterdir())


def test_a_job_of_a_sweep_that_cannot_be_read_is_found_before_any_runs(here: Place) -> None:
    ended = run_in_copy(here.root, lambda: cli.main(["model", *words(), "-m", "search.seed=0,x", "hydra.sweep.dir=s"]))
    assert ended.status in (1, 2), ended.out
    assert "Traceback" not in ended.err and "search.seed" in ended.err, ended.err
    assert all(line.startswith("heretic-ds: ") for line in ended.err.splitlines()), ended.err


def trials(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "results.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in found]
