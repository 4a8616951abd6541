"""Locks that killed builds leave behind do not stop the next one."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from heretic_ds.placements import deepspeed as op_building


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "async_io"
    folder.mkdir(parents=True)
    return folder / "lock"


def age(lock: Path, seconds: float) -> None:
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_lock_that_nobody_holds_is_removed_once_nothing_has_changed_for_long(
    lock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock.touch()
    age(lock, 700)
    with caplog.at_level(logging.WARNING):
        op_building.wait_for_locks()
    assert not lock.exists() and f"removed {lock}" in caplog.text


def test_a_lock_that_may_be_another_machines_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock.touch()
    (lock.parent / "half.o").touch()
    age(lock, 700)  # an object file is new: somebody builds
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            lock.unlink()  # the other one is done

    monkeypatch.setattr(op_building, "time", SimpleNamespace(time=time.time, sleep=nap))
    with caplog.at_level(logging.WARNING):
        op_building.wait_for_locks()
    assert len(naps) == 3 and caplog.text.count("delete that file") == 1 and "removed" not in caplog.text


def test_a_lock_that_a_process_here_holds_is_left_to_torch(lock: Path) -> None:
    with lock.open("w"):
        age(lock, 700)
        op_building.wait_for_locks()
        assert lock.exists()


def test_an_op_that_is_there_is_not_waited_for(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_building, "wait_for_locks", lambda: pytest.fail("waited"))
    builder = SimpleNamespace(name="async_io", _loaded_ops={"async_io": "op"}, load=lambda verbose: "op")
    assert op_building.load_op(builder) == "op"
