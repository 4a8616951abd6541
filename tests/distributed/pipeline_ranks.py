"""What the tests of pipelines run on every rank."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import torch.distributed as dist

from heretic_ds.errors import UserError
from heretic_ds.placements import build_engine, placements_of
from heretic_ds.world import World
from tests.distributed.engines import LENGTHS, job_for, measure, prompts, target
from tests.distributed.memory_ranks import scores, starved
from tests.distributed.output_edits_ranks import score
from tests.distributed.zero3_ranks import status


def engine_of(world: World, folder: str, batch_size: int = 3, placement: str = "pipeline", **options: Any) -> Any:
    """An engine for both phases, checked as a job's is."""
    job = job_for(world, folder, batch_size)
    job.settings.evaluate = target(placement, **options)
    return build_engine(job, "evaluate")


def measured(world: World, folder: str, count: int = len(LENGTHS), **options: Any) -> dict[str, Any]:
    """All that an engine says of one model, and whether its memory is given back."""
    engine = engine_of(world, folder, **options)
    weights = [weakref.ref(parameter) for parameter in engine.model.parameters()]
    found = measure(engine, count)
    found["names"] = sorted(dict(engine.model.named_parameters()))
    engine.close()
    gc.collect()
    found["released"] = all(weight() is None for weight in weights)
    return found


def scores_of_trials(world: World, folder: str, tables: bool = True, **options: Any) -> dict[str, Any]:
    """KL and answers of several edits in one pass, in every mode."""
    with contextlib.closing(engine_of(world, folder, **options)) as engine:
        return score(engine, True, tables, collectives=False)


def refusal(world: World, folder: str, placement: str = "pipeline", **options: Any) -> str:
    """The message with which a placement refuses a model or options before it builds anything."""
    job = job_for(world, folder)
    job.settings.evaluate = target(placement, **options)
    try:
        world.agree(lambda: placements_of(job.settings)["evaluate"].check(job))
    except UserError as error:
        return str(error)
    return "accepted"


def starved_scores(world: World, folder: str, rank: int, placement: str = "pipeline", **options: Any) -> dict[str, Any]:
    """All scores where memory runs out on one rank alone, within its first block, beside those with memory enough."""
    with contextlib.closing(engine_of(world, folder, 1, placement, **options)) as engine:
        expected = scores(engine, True)
    with contextlib.closing(engine_of(world, folder, 7, placement, **options)) as engine:
        with starved(engine, block=engine.anatomy.writers[0].block) if world.rank == rank else contextlib.nullcontext():
            found = scores(engine, True)
        return {"found": found, "expected": expected, "sizes": dict(engine.batch_sizes)}


def killed(world: World, folder: str, rank: int, heard: str, **options: Any) -> None:
    """One rank is killed in the middle of answering; each other one writes how many seconds later it knew."""
    engine = engine_of(world, folder, 7, **options)
    steps, block = [0], engine.model.get_submodule(engine.anatomy.blocks)[engine.anatomy.writers[0].block]

    def count(*args: Any) -> None:
        steps[0] += 1
        if world.rank == rank and steps[0] > 5:
            Path(heard).with_suffix(".killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)

    block.register_forward_pre_hook(count)
    try:
        engine.generate(prompts(), [None])
    except Exception:
        at = float(Path(heard).with_suffix(".killed").read_text())
        Path(heard).with_suffix(f".{world.rank}").write_text(str(time.monotonic() - at))
        os._exit(1)  # as a command would: others may wait for this rank


def memory_of_loading(world: World, folder: str, parity_check: bool) -> dict[str, int]:
    """Bytes of host memory that loading took at its peak above what was used before, and what is held afterwards."""
    import deepspeed  # noqa: F401 - its modules are no part of the model

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmHWM")
    with contextlib.closing(engine_of(world, folder, parity_check=parity_check)) as engine:
        peak, sizes = status("VmHWM") - before, [parameter.nbytes for parameter in engine.model.parameters()]
    return {"peak": peak, "held": sum(sizes), "largest": max(sizes)}


def mesh(world: World, width: int, stages: int) -> tuple[list[int] | None, list[int] | None]:
    """The ranks of this rank's stage, and those of its line."""
    found = world.mesh(width, stages, "degrees")
    assert world.mesh(width, stages, "degrees") is found, "groups are made once"
    groups = (found.near.inside, found.line)
    near, line = (None if group is None else dist.get_process_group_ranks(group) for group in groups)
    return near, line
