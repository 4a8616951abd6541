"""What the tests of pipelines run on every rank."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

from heretic_ds.errors import UserError
from heretic_ds.placements import build_engine
from heretic_ds.world import World
from tests.distributed.engines import LENGTHS, job_for, measure, target
from tests.distributed.output_edits_ranks import score


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
    """The message with which a placement refuses a model or options; "accepted" where it does not."""
    try:
        engine_of(world, folder, placement=placement, **options).close()
    except UserError as error:
        return str(error)
    return "accepted"
