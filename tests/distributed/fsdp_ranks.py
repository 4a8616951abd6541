"""What the tests of ``fsdp`` run on every rank."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heretic_ds.ablation import ROW_NORMS
from heretic_ds.checkpoint.open import OpenedModel
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.memory import give_back_memory
from heretic_ds.placements import build_engine
from heretic_ds.placements.fsdp.units import Units, gathered
from heretic_ds.runner.engine import Runner
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed import output_edits_ranks
from tests.distributed.engines import EDIT, LENGTHS, ablation_for, build, job_for, prompts, target
from tests.distributed.zero3_ranks import STOPS, bytes_read, status


def engine_of(world: World, folder: str, phase: str = "evaluate", options: Any = None, **job: Any) -> Runner:
    """The engine of a phase."""
    wanted = fsdp_job(world, folder, phase, options, **job)
    engine = build_engine(wanted, phase)
    assert isinstance(engine, Runner)
    return engine


def fsdp_job(world: World, folder: str, phase: str, options: Any = None, **job: Any) -> Job:
    made = job_for(world, folder, **job)
    setattr(made.settings, phase, target("fsdp", **(options or {})))
    return made


def measure(world: World, folder: str, count: int = len(LENGTHS)) -> dict[str, Any]:
    """Everything an engine says about one model: unedited, edited in every mode, and restored."""
    engine = engine_of(world, folder)
    engine._ends = STOPS
    things = [weakref.ref(thing) for thing in (*engine.model.modules(), *engine.model.parameters())]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in engine.model.parameters())
    held = sum(own.nbytes for own in own_parts(engine).values())
    found = _scores(engine, count) | {"degree": engine.degree, "held": held / whole}
    engine.close()
    del engine
    gc.collect()
    found["alive"] = sum(thing() is not None for thing in things)
    return found


def measure_replicated(folder: Path, count: int = len(LENGTHS)) -> dict[str, Any]:
    """The same on ``replicated``, in this process alone, by whole passes."""
    job = job_for(World(), str(folder))
    job.settings.generation.prefill_reuse = False
    engine = build(job, "replicated")
    engine._ends = STOPS
    found = _scores(engine, count)
    engine.close()
    return found


def _scores(engine: Runner, count: int) -> dict[str, Any]:
    rows, before = prompts(count), {name: own.clone() for name, own in own_parts(engine).items()}
    found: dict[str, Any] = {"means": engine.capture(rows), "answers": {}, "kl": {}, "weights": {}}
    engine.prepare(ablation_for(engine, "none"))
    reference = Divergence().begin(engine, rows)
    found["answers"]["original"] = engine.generate(rows, [None])[0]
    for row_norm in ROW_NORMS:
        engine.prepare(ablation_for(engine, row_norm, through_norm=row_norm == "pre"))
        found["kl"][row_norm] = reference.of([EDIT])[0]
        found["answers"][row_norm] = engine.generate(rows, [EDIT])[0]
        engine.apply(EDIT)
        found["weights"][row_norm] = whole_writers(engine)
    engine.restore()
    after = own_parts(engine)
    found["restored"] = all(torch.equal(own, after[name]) for name, own in before.items())
    return found


def own_parts(engine: Runner) -> dict[str, Tensor]:
    """What this rank holds of every parameter, by name."""
    parameters: dict[str, Any] = dict(engine.model.named_parameters())
    return {name: getattr(p, "_local_tensor", p).detach() for name, p in parameters.items()}


def whole_writers(engine: Runner) -> dict[str, Tensor]:
    """The weights of all writers, as they are now."""
    found = {}
    for writer in engine.anatomy.writers:
        if engine.traits.name == "fsdp":
            with gathered(engine.model, engine.anatomy, writer.block):
                found[writer.weight] = writer.weight_DK(engine.model).clone()
        else:
            found[writer.weight] = writer.weight_DK(engine.model).clone()
    return found
