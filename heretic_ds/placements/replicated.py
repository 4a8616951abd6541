"""The placement ``replicated``: the whole model on every rank's device, each rank at work on its own prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heretic_ds.checkpoint.open import load_weights
from heretic_ds.placements.base import runner_options
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner
from heretic_ds.settings import PlacementSettings

if TYPE_CHECKING:
    from heretic_ds.job import Job


def build(job: Job, placement: PlacementSettings, phase: str) -> Runner:
    """The engine over a model that is loaded whole onto its device."""
    comm = Comm.of_replicas(job.world, placement.degree or 1, f"{phase}.degree")
    loaded = job.world.agree(lambda: load_weights(job.opened))
    runner = Runner(loaded.model, job.anatomy, loaded.tokenizer, runner_options(job), comm)
    runner.whole = loaded
    return runner
