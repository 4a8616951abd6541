"""What the tests of edits along several directions run on every rank."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from heretic_ds.directions import METHODS, Request
from heretic_ds.placements import build_engine
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed.engines import EDIT, ablation_for, job_for, prompts, target
from tests.distributed.output_edits_ranks import EDITS

RANK = 3


def score(world: World, folder: str, placement: str, together: bool = True, **options: Any) -> dict[str, Any]:
    """KL and answers of edits, in one pass or one after another, and of really edited weights."""
    job = job_for(world, folder)
    job.settings.evaluate = target(placement, **options)
    found: dict[str, Any] = {"kl": {}, "answers": {}, "weights": {}}
    rows, passes = prompts(), [EDITS] if together else [[edit] for edit in EDITS]
    with contextlib.closing(build_engine(job, "evaluate")) as engine:
        for row_norm in ("none", "pre", "full"):
            engine.prepare(ablation_for(engine, row_norm, through_norm=row_norm == "pre", rank=RANK))
            if together:
                engine.max_edits_per_pass = len(EDITS)  # tiny models have no memory for two; that is not to be shown
            reference = Divergence().begin(engine, rows)
            found["kl"][row_norm] = [kl for edits in passes for kl in reference.of(edits)]
            found["answers"][row_norm] = [answers for edits in passes for answers in engine.generate(rows, edits)]
            engine.apply(EDIT)
            found["weights"][row_norm] = reference.of([None])[0]
            engine.restore()
    return found


def find(world: World, folder: str, placement: str, method: str, **options: Any) -> torch.Tensor:
    """The projectors [L+1, D, D] of the directions that a method finds between the first prompts and the others."""
    job = job_for(world, folder, batch_size=2)
    job.settings.capture = target(placement, **options)
    rank = RANK if METHODS[method].many else 1
    with contextlib.closing(build_engine(job, "capture")) as engine:
        rows, anatomy = prompts(), job.anatomy
        request = Request(rows[:4], rows[4:], anatomy.n_blocks + 1, anatomy.width, rank=rank, groups=3)
        found = METHODS[method]().find(engine, request, world)
    return found.directions_LRD.transpose(-1, -2) @ found.directions_LRD
