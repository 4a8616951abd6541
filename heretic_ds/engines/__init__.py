"""Engines: a model laid out on devices, able to capture, score and edit. One file per placement."""

from __future__ import annotations

from collections.abc import Callable

from heretic_ds.anatomy import Anatomy
from heretic_ds.engines import replicated
from heretic_ds.engines.protocol import Engine
from heretic_ds.loading import LoadedModel
from heretic_ds.settings import Settings

__all__ = ["PLACEMENTS", "Engine", "build_engine"]

Build = Callable[[Settings, LoadedModel, Anatomy, dict[str, int]], Engine]


PLACEMENTS: dict[str, Build] = {"replicated": replicated.build}
"""How to build the engine of each placement."""


def build_engine(settings: Settings, loaded: LoadedModel, anatomy: Anatomy, measured: dict[str, int]) -> Engine:
    """The engine that ``settings`` ask for; ``measured`` holds batch sizes that are known already, by phase."""
    return PLACEMENTS[settings.evaluate.placement](settings, loaded, anatomy, measured)
