"""A disk that fills up at any moment: one line that names the folder, and with room again the run is the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heretic_ds.settings import Settings
from tests.hostile.harness import Ended, Place, command, copy_of, files_below, run_in_copy, settings_for

Mount = Callable[[int], None]


@pytest.fixture
def here(untouched: Path) -> Place:
    """A folder with a model and prompts, and an empty one to be a disk."""
    place = copy_of(untouched, untouched.with_name("case"), with_run=False)
    (place.root / "disk").mkdir()
    return place


@pytest.fixture
def disk(here: Place) -> Iterator[Mount]:
    """`disk(kib)`: a disk of that size at `disk`, or another size for the one that is there."""
    folder = str(here.root / "disk")
    mounted = []

    def mount(kib: int) -> None:
        options = ["-o", f"{'remount,' if mounted else ''}size={kib}k", "tmpfs", folder]
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no disk can be mounted: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
        mounted.append(kib)

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


def run(place: Place, base: Settings, **given: Any) -> Ended:
    settings = settings_for(base, {"run.dir": "disk/run", "export.dir": "out", "search.trials": 4} | given)
    return run_in_copy(place.root, lambda: command(settings))


def trials(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "results.json").read_text())["trials"]
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in found]


@pytest.fixture(scope="module")
def uninterrupted(untouched: Path, base: Settings) -> list[dict[str, Any]]:
    """The trials of a run that never met a full disk."""
    place = copy_of(untouched, untouched.with_name("case"), with_run=False)
    ended = run(place, base, **{"run.dir": "elsewhere"})
    assert ended.status == 0, ended.err
    return trials(place.root / "elsewhere")


@pytest.mark.parametrize("kib", [4, 8, 12, 16, 20, 24, 28, 36, 44, 60])
def test_the_run_folders_disk(kib: int, disk: Mount, here: Place, base: Settings, uninterrupted: Any) -> None:
    disk(kib)
    ended = run(here, base)
    if ended.status:
        assert ended.status == 2, ended.err
        [line] = ended.err.splitlines()
        assert line.startswith("heretic-ds: the disk of disk/run is full: ") and "more than are free" in line
        assert not (here.root / "out").exists()
    disk(4000)
    again = run(here, base)
    assert again.status == 0, again.err + again.out
    assert trials(here.root / "disk" / "run") == uninterrupted
    assert (here.root / "out" / "model.safetensors").is_file()


def test_small_disks_are_too_small(disk: Mount, here: Place, base: Settings) -> None:
    """That the sizes above are those at which a run ends."""
    disk(16)
    assert run(here, base).status == 2
    disk(4000)
    assert run(here, base).status == 0


def test_an_older_export_stays_where_the_disk_fills_before_the_new_one(
    disk: Mount, here: Place, base: Settings
) -> None:
    disk(200_000)
    first = {"run.dir": "run", "export.dir": "disk/model"}
    assert run(here, base, **first).status == 0
    before = files_below(here.root / "disk")
    size = sum(len(content) for content in before.values())
    disk(size // 1024 + 80)

    def with_room_until_then() -> int:
        from heretic_ds.export import target

        target.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=10**9), rmtree=shutil.rmtree)
        return command(settings_for(base, first | {"search.trials": 5, "export.trial": 3}))

    ended = run_in_copy(here.root, with_room_until_then)
    assert ended.status == 2, ended.err + ended.out
    [line] = ended.err.splitlines()
    assert line.startswith("heretic-ds: export.dir=") and "could not be written" in line
    assert files_below(here.root / "disk") == before
    disk(200_000)
    assert run(here, base, **first, **{"search.trials": 5, "export.trial": 3}).status == 0


def test_a_disk_that_is_only_read(disk: Mount, here: Place, base: Settings) -> None:
    """A model may lie there; a run folder or an export is one line, before anything is computed."""
    disk(4000)
    shutil.move(here.model, here.root / "disk" / "model")
    folder = str(here.root / "disk")
    subprocess.run(["mount", "-o", "remount,ro", "-t", "tmpfs", "tmpfs", folder], check=True)
    model = {"model.path": "disk/model", "search.trials": 1}
    try:
        for given, said in (
            ({"run.dir": "disk/run", "export.dir": "out"}, "disk/run"),
            ({"run.dir": "run", "export.dir": "disk/out"}, "is not a folder that can be written to"),
        ):
            ended = run(here, base, **model, **given)
            assert ended.status == 2, ended.out
            [line] = ended.err.splitlines()
            assert line.startswith("heretic-ds: ") and said in line, line
            assert "directions:" not in ended.out or given["run.dir"] != "run"
        ended = run(here, base, **model, **{"run.dir": "run2"})
        assert ended.status == 0, ended.err
    finally:
        subprocess.run(["mount", "-o", "remount,rw", "-t", "tmpfs", "tmpfs", folder], check=True)
