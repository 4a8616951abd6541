"""The placement ``replicated``: the whole model on every rank's device, each rank at work on its own prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heretic_ds.engines.resident import ResidentEngine
from heretic_ds.loading import load_weights
from heretic_ds.settings import PlacementSettings

if TYPE_CHECKING:
    from heretic_ds.job import Job


def build(job: Job, placement: PlacementSettings, phase: str) -> ResidentEngine:
    """The engine over a model that is loaded whole onto its device."""
    world, generation = job.world, job.settings.generation
    replicas = world.replicas(placement.degree or 1, f"{phase}.degree")
    loaded = world.agree(lambda: load_weights(job.opened), "reading the weights")
    engine = ResidentEngine(
        loaded.model,
        loaded.tokenizer,
        job.anatomy,
        generation.max_new_tokens,
        generation.batch_size,
        replicas=replicas,
        same=world.same,
        cuda_graphs=generation.cuda_graphs,
        prefill_reuse=generation.prefill_reuse,
    )
    engine.whole = loaded
    return engine
