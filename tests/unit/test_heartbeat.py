"""Long work of one rank is waited for while its heart beats, and no longer."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch.distributed as dist

from heretic_ds import heartbeat
from heretic_ds.errors import RankFailed
from heretic_ds.heartbeat import Heartbeats


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts that beat ten times as fast, and little patience."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(heartbeat, "LATE_SECONDS", 2.5)
    monkeypatch.setattr(heartbeat, "TELL_SECONDS", 0.5)


def together(
    *parts: Callable[[], None], workers: Sequence[int], works: int = 1, store: dist.Store | None = None
) -> list[tuple[float, str]]:
    """Seconds after which each rank was through with its works, and the error it ended with; ranks are threads."""
    store = store or dist.HashStore()
    ended: list[tuple[float, str]] = [(0.0, "still at it")] * len(parts)
    started = time.monotonic()

    def run(rank: int, part: Callable[[], None]) -> None:
        hearts, error = Heartbeats(store, rank), ""
        try:
            for _ in range(works):
                with hearts.together("baking", workers):
                    part()
        except Exception as problem:
            error = str(problem)
        ended[rank] = time.monotonic() - started, error

    threads = [threading.Thread(target=run, args=(rank, part), daemon=True) for rank, part in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ended


def nothing() -> None:
    pass


def test_work_is_waited_for_however_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "heretic_ds"):
        (own, error), (waited, problem) = together(lambda: time.sleep(2.5), nothing, workers=[0])
    assert (error, problem) == ("", "") and own >= 2.5 and 2.5 <= waited < 4
    told = [record.getMessage() for record in caplog.records]
    assert 2 <= len(told) <= 5 and told[0].startswith("waiting for rank 0, which is baking (for ")


def test_every_rank_may_have_a_part() -> None:
    ended = together(nothing, lambda: time.sleep(1.5), nothing, workers=range(3))
    assert all(seconds >= 1.5 and error == "" for seconds, error in ended)


def test_short_works_do_not_wait_for_long_pauses() -> None:
    ended = together(nothing, nothing, workers=[0], works=50)
    assert all(seconds < 5 and error == "" for seconds, error in ended)


def test_a_silent_rank_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeats, "_beat", lambda *_: None)
    ended = together(lambda: time.sleep(4), nothing, workers=[0])
    seconds, error = ended[1]
    assert 1.0 <= seconds < 2.5
    assert re.fullmatch(r"rank 0 has not been heard of for \d s while it was baking: it has died, or hangs", error)


@pytest.mark.parametrize(("late", "given_up"), [(1.5, False), (4.0, True)])
def test_a_rank_may_come_later_than_hearts_may_be_silent(late: float, given_up: bool) -> None:
    store, errors = dist.HashStore(), []

    def come(rank: int) -> None:
        try:
            time.sleep(0 if rank else late)
            with Heartbeats(store, rank).together("baking", [0]):
                pass
        except RankFailed as error:
            errors.append(str(error))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [error[:27] for error in errors] == ["rank 0 has not been heard o"] * given_up


class Gone(dist.HashStore):  # type: ignore[misc]
    """A store whose server does not answer any more."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer")


def test_with_rank_0_goes_the_store() -> None:
    _, (seconds, error) = together(lambda: time.sleep(1), nothing, workers=[0], store=Gone())
    assert error == "rank 0 ended while ranks were baking" and seconds < 1


def test_a_rank_that_leaves_by_an_error_is_not_waited_for() -> None:
    def fail() -> None:
        raise ValueError("burnt")

    (_, error), (seconds, problem) = together(fail, nothing, workers=[0])
    assert (error, problem) == ("burnt", "") and seconds < 1
