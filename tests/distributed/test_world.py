"""What ranks tell each other: results, errors of every kind, and the groups they do it in."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from heretic_ds import heartbeat
from heretic_ds.errors import RankFailed, SearchFailed, UnfitDtype, UserError
from heretic_ds.world import World
from tests.distributed import ranks as real_ranks
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed

RanksOf = Callable[[int], Ranks]


class NeedsResponse(Exception):
    """Cannot be made anew from its arguments, like errors of HTTP libraries."""

    def __init__(self, message: str, *, response: int) -> None:
        super().__init__(message)
        self.response = response


class HoldsALock(Exception):
    """Cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


ERRORS: dict[str, Callable[[], Exception]] = {
    "user": lambda: UserError("the disk is full"),
    "finite": lambda: UnfitDtype("NaN in x"),
    "search": lambda: SearchFailed("none is left"),
    "value": lambda: ValueError("a deliberate mistake"),
    "http": lambda: NeedsResponse("no such page", response=404),
    "lock": lambda: HoldsALock("locked"),
}


def fail(world: World, kind: str, where: int) -> tuple[str, str, bool]:
    """The type and text of the error that this rank gets where one rank makes one, and whether it is that very one."""
    made: list[Exception] = []

    def work() -> None:
        if world.rank == where:
            made.append(ERRORS[kind]())
            raise made[0]

    try:
        world.agree(work)
        if where == 0:
            world.decide(work)
    except Exception as error:
        return type(error).__name__, str(error), any(error is own for own in made)
    return "", "", False


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    ("kind", "own", "elsewhere"),
    [
        ("user", "UserError", "UserError"),
        ("finite", "UnfitDtype", "UnfitDtype"),
        ("search", "SearchFailed", "SearchFailed"),
        ("value", "ValueError", "RankFailed"),
        ("http", "NeedsResponse", "RankFailed"),
        ("lock", "HoldsALock", "RankFailed"),
    ],
)
def test_an_error_is_itself_where_it_was_made_and_told_elsewhere(
    ranks: RanksOf, kind: str, own: str, elsewhere: str, where: int
) -> None:
    found = ranks(2).run(fail, kind=kind, where=where)
    text = str(ERRORS[kind]())
    assert found[where] == (own, text, True)
    told, said, same = found[1 - where]
    assert told == elsewhere and not same
    if elsewhere == "RankFailed":
        assert said.startswith(f"rank {where} failed:\nTraceback") and said.endswith(f"{own}: {text}")
    else:
        assert said == text


def fail_apart(world: World) -> tuple[str, str]:
    """The error that this rank gets where each rank makes another."""

    def work() -> None:
        raise (UserError, ValueError)[world.rank](f"that of rank {world.rank}")

    try:
        world.agree(work)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_the_error_of_the_lowest_rank_is_raised_on_all(ranks: RanksOf) -> None:
    assert ranks(2).run(fail_apart) == [("UserError", "that of rank 0")] * 2


def decide(world: World, sendable: bool) -> Any:
    try:
        return world.decide(lambda: {"a": 1} if sendable else threading.Lock())
    except (TypeError, RankFailed) as error:
        return str(error)


def test_what_rank_0_decides_is_sent_or_it_is_said_why_not(ranks: RanksOf) -> None:
    assert ranks(2).run(decide, sendable=True) == [{"a": 1}] * 2
    for said in ranks(2).run(decide, sendable=False):
        assert "what rank 0 made cannot be sent to the other ranks" in said and "lock" in said


def lay_out(world: World) -> tuple[int, list[Any]]:
    """How many process groups several engines' layouts make, and what they are good for."""
    found = []
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as made:
        for degree in (1, 2, None, 1):
            replicas = world.replicas(degree, "degree")
            own = [f"{item} of rank {world.rank}" for item in replicas.share(3)]
            sums = replicas.total(torch.tensor(world.rank + 1.0)).item()
            found.append((replicas.gather(own, 3), sums, replicas.alike(world.rank)))
    return made.call_count, found


def test_layouts_make_no_group_that_there_is_already(ranks: RanksOf) -> None:
    split = ["0 of rank 0", "1 of rank 1", "2 of rank 0"]
    (calls, first), (_, second) = ranks(2).run(lay_out)
    assert calls == 0
    assert first[0] == first[3] == (split, 3.0, 0) and second[0] == second[3] == (split, 3.0, 1)
    assert first[1] == first[2] == ([f"{item} of rank 0" for item in range(3)], 1.0, 0)
    assert second[1] == second[2] == ([f"{item} of rank 1" for item in range(3)], 2.0, 0)


def test_groups_of_a_part_of_the_ranks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []
    monkeypatch.setattr(dist, "new_group", lambda ranks: made.append(ranks) or ranks)
    world = World(rank=1, size=4)
    for _ in range(3):
        replicas = world.replicas(2, "degree")
        assert (replicas.inside, replicas.across) == ([0, 1], [1, 3])
    assert made == [[0, 1], [2, 3], [0, 2], [1, 3]]


# Long work


@contextmanager
def collectives_end_after(seconds: float) -> Iterator[None]:
    """Within it, ranks that come to a collective further apart than that fail."""
    for timeout in (timedelta(seconds=seconds), timedelta(minutes=30)):
        dist.distributed_c10d._set_pg_timeout(timeout)
        if timeout.seconds == seconds:
            yield


def work_long(world: World, seconds: float, named: bool) -> tuple[str, str]:
    """What comes of work of rank 0, and then of all ranks but it, that takes far longer than collectives wait."""
    what = "resting" if named else None

    def rest(seconds: float) -> str:
        time.sleep(seconds)
        return "rested"

    with collectives_end_after(3):
        decided = world.decide(lambda: rest(seconds), what)
        agreed = world.agree(lambda: rest(seconds / 2) if world.rank else "at once", what)
    return decided, agreed


def test_named_work_may_take_longer_than_collectives_wait(ranks: RanksOf) -> None:
    assert ranks(2).run(work_long, seconds=9, named=True) == [("rested", "at once"), ("rested", "rested")]


def test_work_without_a_name_may_not() -> None:
    """Or else the test above would say nothing."""
    own = Ranks(2)
    with pytest.raises(real_ranks.RankFailed, match=r"(?i)timed out|closed by peer"):
        own.run(work_long, seconds=9, named=False)
    own.close()


def end_at_work(world: World, number: int) -> None:
    heartbeat.BEAT_SECONDS, heartbeat.SILENT_SECONDS = 0.2, 1.5
    world.decide(lambda: os.kill(os.getpid(), number), "writing the model")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_with_a_sentence_where_rank_0_dies_or_hangs_at_work(number: int) -> None:
    own = Ranks(2)
    started = time.monotonic()
    with pytest.raises(real_ranks.RankFailed) as failure:
        own.run(end_at_work, timeout=30, number=number)
    own.close()
    assert re.search(r"rank 0 has not been heard of for \d s while it was writing the model", str(failure.value))
    assert time.monotonic() - started < 30
