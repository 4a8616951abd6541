"""The placement ``replicated``: the whole model on one device."""

from __future__ import annotations

from heretic_ds.anatomy import Anatomy
from heretic_ds.engines.resident import ResidentEngine
from heretic_ds.loading import LoadedModel
from heretic_ds.settings import Settings


def build(settings: Settings, loaded: LoadedModel, anatomy: Anatomy, measured: dict[str, int]) -> ResidentEngine:
    """The engine over a model that was loaded whole onto its device."""
    generation = settings.generation
    return ResidentEngine(
        loaded.model, loaded.tokenizer, anatomy, generation.max_new_tokens, generation.batch_size, measured
    )
