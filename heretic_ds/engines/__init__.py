"""Engines: a model laid out on devices, able to capture, score and edit. One file per placement."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from heretic_ds.engines.protocol import Engine

if TYPE_CHECKING:
    from heretic_ds.job import Job

__all__ = ["PLACEMENTS", "Engine", "build_engine"]

PLACEMENTS = {
    "replicated": "heretic_ds.engines.replicated",
    "zero3": "heretic_ds.engines.zero3",
}
"""The module of each placement; its ``build(job, placement, phase)`` gives the engine. Imported only when chosen."""


def build_engine(job: Job, phase: str) -> Engine:
    """The engine that the settings ask for in one phase: ``capture`` or ``evaluate``."""
    placement = job.settings.capture if phase == "capture" else job.settings.evaluate
    engine: Engine = importlib.import_module(PLACEMENTS[placement.placement]).build(job, placement, phase)
    return engine
