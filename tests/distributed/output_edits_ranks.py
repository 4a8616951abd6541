"""What the tests of edits in output space run on every rank."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from heretic_ds.ablation import ROW_NORMS, Edit, Profile
from heretic_ds.edits import tables as edit_tables
from heretic_ds.runner.engine import Runner
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed.engines import EDIT, ablation_for, build, job_for, prompts

EDITS = (
    EDIT,
    None,
    Edit(None, {"attention": Profile(0.8, 0.0, 0.8, 0.5)}),
    Edit(0.9, {"attention": Profile(-0.7, 0.3, 1.5, 2.0), "mlp": Profile(1.5, 1.0, 1.2, 1.5)}),
)


def score(engine: Runner, together: bool, tables: bool = True, collectives: bool = True) -> dict[str, Any]:
    """KL and answers of all edits in every mode, in one pass or one after another; collectives of a first-token pass
    with and without edits. Without ``tables`` each pass computes what its edits need of experts."""
    if not tables:
        with mock.patch.multiple(edit_tables, _LEAST_BYTES=0, _SHARE_OF_WEIGHTS=0.0):
            return score(engine, together, collectives=collectives)
    found: dict[str, Any] = {"kl": {}, "answers": {}, "collectives": {}}
    rows, passes = prompts(), [EDITS] if together else [[edit] for edit in EDITS]
    for row_norm in ROW_NORMS:
        engine.prepare(ablation_for(engine, row_norm, through_norm=row_norm == "pre"))
        if engine.max_edits_per_pass == 1:  # no memory for two; that is not to be shown here
            engine.max_edits_per_pass, found["without tables"] = len(EDITS), row_norm
        reference = Divergence().begin(engine, rows)
        found["kl"][row_norm] = [kl for edits in passes for kl in reference.of(edits)]
        found["answers"][row_norm] = [answers for edits in passes for answers in engine.generate(rows, edits)]
        if together and collectives and dist.is_initialized():
            found["collectives"][row_norm] = [_collectives(engine, edits) for edits in ((None,), EDITS, EDITS[::-1])]
    return found


def _collectives(engine: Runner, edits: Any) -> list[int]:
    """Numbers that each all-reduce of one pass moves for one prompt, of which every edit has its own copy."""
    engine.batch_sizes["kl"] = len(EDITS)
    reference = Divergence().begin(engine, prompts(1))
    reference.of(edits)  # the first pass of a size is guarded, which takes collectives of its own
    moved: list[int] = []
    real = dist.all_reduce

    def counted(tensor: Any, *args: Any, **options: Any) -> Any:
        moved.append(tensor.numel() // len(edits))
        return real(tensor, *args, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        reference.of(edits)
    return moved


def score_split(world: World, folder: str, backend: str = "auto", tables: bool = True) -> dict[str, Any]:
    """:func:`score`, all edits in one pass, on the placement ``tensor_parallel`` over all ranks."""
    job = job_for(world, folder)
    with contextlib.closing(build(job, "tensor_parallel", degree=world.size, backend=backend)) as engine:
        return score(engine, True, tables)


def score_replicated(world: World, folder: str) -> dict[str, Any]:
    """The same on ``replicated``: every rank has prompts of its own."""
    with contextlib.closing(build(job_for(world, folder), "replicated")) as engine:
        return score(engine, together=True)


def score_one_by_one(folder: Path) -> dict[str, Any]:
    """One edit after another in the weights, in this process alone."""
    with contextlib.closing(build(job_for(World(), str(folder)), "replicated")) as engine:
        return score(engine, together=False)
