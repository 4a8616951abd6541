"""The placement ``replicated``: the whole model on every rank's device, each rank at work on its own prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from heretic_ds.checkpoint.open import load_weights
from heretic_ds.placements.base import Placement, runner_of
from heretic_ds.placements.costs import MERGING, READ_BUFFER, Cost, Facts, Resources, Use, estimate
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits

if TYPE_CHECKING:
    from heretic_ds.job import Job


class Replicated(Placement):
    """The whole model on every rank's device, each rank at work on its own prompts."""

    name, phases = "replicated", frozenset({"capture", "evaluate"})
    whole = graphs = True
    burden = 0

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """All weights on each rank; transformers reads them, and has its own copy of experts that it puts together."""
        merging = math.ceil(MERGING * facts.weights) if facts.merges_experts else READ_BUFFER
        graphs = self.graphs and not resources.on_cpu and facts.experts is None
        use = Use(facts.weights, resources.ranks, loading=merging, graphs=graphs, reuses=True)
        return estimate(facts, resources, self.phase, use)

    def build(self, job: Job) -> Runner:
        """The engine over a model that is loaded whole onto its device."""
        comm = Comm.of_replicas(job.world, 1, f"{self.phase}.degree")
        loaded = job.world.agree(lambda: load_weights(job.opened), "reading the weights")
        engine = runner_of(job, loaded.model, comm, Traits(self.name, graphs=self.graphs))
        engine.whole = loaded
        return engine
