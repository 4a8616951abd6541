"""The placement ``replicated``: the whole model on every rank's device, each rank at work on its own prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heretic_ds.checkpoint.open import load_weights
from heretic_ds.placements.base import Placement, engine_of
from heretic_ds.runner.engine import ResidentEngine

if TYPE_CHECKING:
    from heretic_ds.job import Job


class Replicated(Placement):
    """The whole model on every rank's device, each rank at work on its own prompts."""

    name, phases = "replicated", frozenset({"capture", "evaluate"})
    whole = graphs = True

    def build(self, job: Job) -> ResidentEngine:
        """The engine over a model that is loaded whole onto its device."""
        world, generation = job.world, job.settings.generation
        replicas = world.replicas(1, f"{self.phase}.degree")
        loaded = world.agree(lambda: load_weights(job.opened))
        engine = engine_of(
            job,
            loaded.model,
            ResidentEngine,
            replicas=replicas,
            cuda_graphs=generation.cuda_graphs,
            prefill_reuse=generation.prefill_reuse,
        )
        engine.whole = loaded
        return engine
