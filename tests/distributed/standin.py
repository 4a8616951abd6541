"""What the launching tests run as ranks instead of heretic_ds: quick to start, and badly behaved on request.

    python -m standin FOLDER BEHAVIOUR [words ...]

Every rank writes what it was given to FOLDER/<rank>.json before it misbehaves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from heretic_ds.launching import rank_guard

ENVIRONMENT = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "X",
)


def main() -> int:
    folder, behaviour, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rank = int(os.environ["RANK"])
    print(f"output of rank {rank}", flush=True)
    given = {name: os.environ.get(name) for name in ENVIRONMENT}
    part = folder / f"{rank}.part"
    part.write_text(json.dumps({"pid": os.getpid(), "words": words, "cwd": os.getcwd(), **given}))
    part.rename(folder / f"{rank}.json")
    return BEHAVIOURS[behaviour](rank, folder)


def end_well(rank: int, folder: Path) -> int:
    return 0


def all_find_the_same(rank: int, folder: Path) -> int:
    rank_guard.leave_word("heretic-ds: there is no such model", 2)
    return 2


def second_finds_something(rank: int, folder: Path) -> int:
    if rank == 1:
        rank_guard.leave_word("heretic-ds: the disk of rank 1 is full", 2)
        return 2
    wait()
    return 0


def second_crashes(rank: int, folder: Path) -> int:
    if rank == 1:
        print("what rank 1 had to say", file=sys.stderr)
        rank_guard.leave_word("Traceback (most recent call last):\n  ...\nRuntimeError: broken", 1, shared=False)
        return 1
    time.sleep(0.3)
    rank_guard.leave_word("RuntimeError: connection closed by peer", 1, shared=False)
    return 1


def hang(rank: int, folder: Path) -> int:
    wait()
    return 0


def hang_on(rank: int, folder: Path) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait()
    return 0


def stop_when_asked(rank: int, folder: Path) -> int:
    """Rank 0 ends its work at the first Ctrl-C; the others end when it has."""
    if rank == 0:
        signal.signal(signal.SIGINT, lambda number, frame: (folder / "stopped").touch())
    while not (folder / "stopped").exists():
        time.sleep(0.05)
    print(f"rank {rank} stopped", flush=True)
    return 0


def notice_and_hang(rank: int, folder: Path) -> int:
    if rank == 0:
        signal.signal(signal.SIGINT, lambda number, frame: (folder / "stopped").touch())
    wait()
    return 0


def add_up(rank: int, folder: Path) -> int:
    """What ranks are for: 1 + 2 over the nodes, after work that rank 0 does alone."""
    import torch

    from heretic_ds.world import World

    world = World.join()
    start = world.decide(lambda: 1.0, "counting")
    number = torch.tensor([rank + start])
    torch.distributed.all_reduce(number)
    (folder / f"sum-{rank}").write_text(str(number.item()))
    world.leave()
    return 0


def gather_weights(rank: int, folder: Path) -> int:
    """Passes without end over a model that is cut over the ranks."""
    from heretic_ds.world import World
    from tests.distributed import fsdp_ranks
    from tests.distributed.engines import prompts

    engine = fsdp_ranks.engine_of(World.join(), sys.argv[3])
    while True:
        engine.capture(prompts())
        (folder / f"{rank}.passed").touch()


def wait() -> None:
    for _ in range(600):
        time.sleep(0.5)


BEHAVIOURS = {
    function.__name__: function
    for function in (
        end_well,
        all_find_the_same,
        second_finds_something,
        second_crashes,
        hang,
        hang_on,
        stop_when_asked,
        notice_and_hang,
        add_up,
        gather_weights,
    )
}

if __name__ == "__main__":
    sys.exit(rank_guard.run(main))
