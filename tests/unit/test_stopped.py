"""Ranks that are stopped: who is told of, when, and when all are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from heretic_ds.launching import stopped
from heretic_ds.launching.stopped import StoppedRanks


class Clock:
    """Seconds that pass as a test wants."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopped, "time", clock)
    return clock


@pytest.fixture
def ranks() -> Iterator[dict[int, psutil.Process]]:
    """Two processes that do nothing."""
    started = [subprocess.Popen(["sleep", "300"]) for _ in range(2)]
    yield {number: psutil.Process(process.pid) for number, process in enumerate(started)}
    for process in started:
        process.kill()
        process.wait()


def stop(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)


def looked(watch: StoppedRanks, ranks: dict[int, psutil.Process], clock: Clock, seconds: float, **more) -> int | None:
    """What looks for so many seconds come to."""
    found = None
    for _ in range(round(seconds)):
        clock.now += 1
        found = found if found is not None else watch.look(ranks, **{"elsewhere": False, **more})
    return found


def test_one_rank_is_told_of_and_given_up(ranks, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    watch = StoppedRanks()
    assert looked(watch, ranks, clock, 400) is None
    stop(ranks[1])
    assert looked(watch, ranks, clock, 9) is None
    assert capsys.readouterr().err == ""
    assert looked(watch, ranks, clock, 280) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"heretic-ds: rank 1 is stopped, and the others wait for it: kill -CONT {ranks[1].pid} ")
    assert looked(watch, ranks, clock, 20) == 1


def test_a_rank_that_goes_on_starts_anew(ranks, clock: Clock) -> None:
    watch = StoppedRanks()
    for _ in range(3):
        stop(ranks[0])
        assert looked(watch, ranks, clock, 290) is None
        os.kill(ranks[0].pid, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while ranks[0].status() == psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert looked(watch, ranks, clock, 2) is None


def test_a_job_that_was_put_aside_waits(ranks, clock: Clock) -> None:
    """All ranks stopped, and time that this process was stopped itself, count for nothing."""
    watch = StoppedRanks()
    for process in ranks.values():
        stop(process)
    assert looked(watch, ranks, clock, 4000) is None
    assert looked(watch, ranks, clock, 400, elsewhere=True) == 0  # those on other nodes may wait
    os.kill(ranks[0].pid, signal.SIGCONT)
    watch = StoppedRanks()
    for _ in range(9):
        clock.now += 10_000
        assert watch.look(ranks, elsewhere=False) is None
