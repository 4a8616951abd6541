"""Engines: a model laid out on devices, able to capture, score and edit. One file per placement."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from heretic_ds.placements.base import Engine

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

__all__ = ["PLACEMENTS", "Engine", "build_engine"]

PLACEMENTS = {
    "replicated": "heretic_ds.placements.replicated",
    "zero3": "heretic_ds.placements.zero3",
    "tensor_parallel": "heretic_ds.placements.tensor_parallel",
    "expert_parallel": "heretic_ds.placements.expert_parallel",
    "kernel_inject": "heretic_ds.placements.kernel_inject",
}
"""The module of each placement; its ``build(job, placement, phase)`` gives the engine. It may have a ``check`` of the
same arguments, that refuses what it cannot serve before any phase loads weights. Imported only when chosen."""


def build_engine(job: Job, phase: str) -> Engine:
    """The engine that the settings ask for in one phase: ``capture`` or ``evaluate``."""
    placements = {"capture": job.settings.capture, "evaluate": job.settings.evaluate}
    modules = {name: importlib.import_module(PLACEMENTS[chosen.placement]) for name, chosen in placements.items()}
    for name, module in modules.items():
        if hasattr(module, "check"):
            job.world.agree(partial(module.check, job, placements[name], name))
    engine: Engine = modules[phase].build(job, placements[phase], phase)
    decodes = placements[phase].placement == placements["evaluate"].placement
    wanted = job.settings.generation.cuda_graphs and job.opened.device.type == "cuda"
    if wanted and decodes and placements[phase].placement != "replicated":
        log.info(
            "decoding without CUDA graphs: they are for evaluate=replicated, where ranks do not wait for each other"
        )
    return engine
