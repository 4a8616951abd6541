"""The ranks that distributed tests rely on: failures are shown, nothing outlives them, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from heretic_ds.world import World
from tests.distributed.ranks import RankFailed, Ranks, fork_server

pytestmark = pytest.mark.distributed


def total(world: World, add: int) -> int:
    """A sum over all ranks."""
    tensor = torch.tensor(world.rank + add)
    dist.all_reduce(tensor)
    return int(tensor)


def stumble(world: World, how: str) -> Any:
    """What goes wrong on rank 1, while rank 0 waits for it in a sum."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    print(f"child {child.pid}", flush=True)
    if world.rank == 1:
        if how == "raise":
            raise ValueError("a deliberate mistake")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)
    return total(world, 0)


@pytest.fixture(autouse=True, scope="module")
def started_fork_server() -> None:
    fork_server()  # which stays


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_ranks_start_once_and_answer_by_rank():
    ranks = Ranks(2)
    before = descendants()
    assert ranks.run(total, add=1) == [3, 3]
    started = descendants() - before
    assert ranks.run(total, add=2) == [5, 5] and descendants() - before == started
    ranks.close()
    assert not descendants() - before


@pytest.mark.parametrize(
    ("how", "shown"), [("raise", "a deliberate mistake"), ("die", "status -9"), ("hang", "longer than 6 s on ranks")]
)
def test_a_failing_rank_is_shown_and_takes_all_processes_with_it(how, shown):
    ranks = Ranks(2)
    before = descendants()
    started = time.monotonic()
    ranks.run(total, add=0)
    with pytest.raises(RankFailed, match=shown) as failure:
        ranks.run(stumble, timeout=6, how=how)
    assert "child " in str(failure.value), "what a rank printed is part of the message"
    assert not descendants() - before and time.monotonic() - started < 60
    assert ranks.run(total, add=0) == [1, 1]
    ranks.close()
