"""Placements: how the model is laid out on devices to capture, score and edit. One file or folder each.

Nothing here but what stands for a choice knows their names: the files of ``conf/capture/`` and ``conf/evaluate/`` name
their classes.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from heretic_ds.conf_files import option_owners
from heretic_ds.errors import UserError
from heretic_ds.placements.auto import left_open, settled, settled_alone
from heretic_ds.placements.base import Capturing, Engine, Evaluating, Placement
from heretic_ds.placements.deepspeed import settle_accelerator
from heretic_ds.settings import PHASES, Settings
from heretic_ds.settings.checks import find_class
from heretic_ds.settings.nodes import options_of

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

__all__ = [
    "Capturing",
    "Engine",
    "Evaluating",
    "Placement",
    "build_engine",
    "left_open",
    "placements_of",
    "settled",
    "settled_alone",
]


def placements_of(settings: Settings) -> dict[str, Placement]:
    """The placement of each phase, with checked options. Raises UserError."""
    placements = {phase: _placement(phase, getattr(settings, phase)) for phase in PHASES}
    for placement in placements.values():
        if obstacle := placement.obstacle_to_packing(settings.model.quantization):
            raise UserError(obstacle)
    return placements


def build_engine(job: Job, phase: str) -> Any:
    """The engine that the settings ask for in one phase: a Capturing for ``capture``, else an Evaluating."""
    placements = placements_of(settled_alone(job.settings) if job.world.size == 1 else job.settings)
    for placement in placements.values():
        job.world.agree(partial(placement.check, job))
    chosen, evaluating = placements[phase], placements["evaluate"]
    if not torch.cuda.is_available():
        # Where accelerate is installed, transformers imports DeepSpeed as it saves a model, which warns that it looked
        # for an accelerator in vain, in the middle of what a run says.
        settle_accelerator(job.opened.device)
    engine = chosen.build(job)
    wanted = job.settings.generation.cuda_graphs and job.opened.device.type == "cuda"
    if wanted and type(chosen) is type(evaluating) and not chosen.graphs:
        log.info(
            "decoding without CUDA graphs: they are for evaluate=replicated, where ranks do not wait for each other"
        )
    return engine


def _placement(phase: str, given: Mapping[str, Any]) -> Placement:
    kind = _class(phase, given.get("_target_"))
    known = [entry.name for entry in fields(kind.Options)]
    made = options_of(kind.Options, given, phase, lambda name, value: _unknown(phase, name, value, kind.name, known))
    return kind(phase, made)


def _class(phase: str, target: Any) -> type[Placement]:
    kind: type[Placement] = find_class(str(target), f"{phase}._target_", Placement)
    if phase not in kind.phases:
        raise UserError(
            f"{phase}={kind.name}: {kind.name} serves {' and '.join(sorted(kind.phases))} only; choose one of "
            f"{', '.join(option_owners(phase)['degree'])} for {phase}"
        )
    return kind


def _unknown(phase: str, name: str, value: Any, placement: str, known: list[str]) -> str:
    """What to say of an option that a phase's placement does not have."""
    owners = option_owners(phase).get(name)
    if owners:
        return f"{phase}.{name}={value} is for {phase}={' or '.join(owners)} alone, but {phase} is {placement}"
    near = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {phase}.{near[0]}?" if near else f"{phase}={placement} has {', '.join(known)}"
    return f"there is no setting {phase}.{name}; {advice}"
