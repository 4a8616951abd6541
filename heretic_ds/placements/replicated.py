"""The placement ``replicated``: the whole model on every rank's device, each rank at work on its own prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heretic_ds.placements.base import Placement, load_whole, runner_of
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits

if TYPE_CHECKING:
    from heretic_ds.job import Job


class Replicated(Placement):
    """The whole model on every rank's device, each rank at work on its own prompts."""

    name, phases = "replicated", frozenset({"capture", "evaluate"})
    whole = graphs = True

    def build(self, job: Job) -> Runner:
        """The engine over a model that is loaded whole onto its device."""
        comm = Comm.of_replicas(job.world, 1, f"{self.phase}.degree")
        loaded = load_whole(job)
        engine = runner_of(job, loaded.model, comm, Traits(self.name, graphs=self.graphs))
        engine.whole = loaded
        return engine
