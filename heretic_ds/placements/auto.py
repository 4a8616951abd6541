"""The choice ``auto``: what stands in the settings until the planner, or the lack of ranks, has named a placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from heretic_ds.conf_files import choice
from heretic_ds.placements.base import Placement
from heretic_ds.settings import PHASES, Settings

if TYPE_CHECKING:
    from heretic_ds.job import Job


class Auto(Placement):
    """One of the others, chosen by what they take of this model on these ranks: `replicated` in one process.

    ``heretic-ds <model> task=plan`` shows the figures. The run folder keeps the choice.
    """

    name, phases = "auto", frozenset({"capture", "evaluate"})
    packs = True

    def build(self, job: Job) -> NoReturn:
        """Nothing can lie this way: a choice has to be made before."""
        raise RuntimeError(f"{self.phase}=auto was left open; a run settles it when it is opened")


def left_open(settings: Settings) -> list[str]:
    """The phases whose placement is yet to be chosen."""
    own = f"{Auto.__module__}.{Auto.__qualname__}"
    return [phase for phase in PHASES if getattr(settings, phase).get("_target_") == own]


def settled(settings: Settings, chosen: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings with these placements, ``_target_`` and options by phase, where they were left open."""
    placed: Any = {phase: dict(chosen[phase]) for phase in left_open(settings)}
    return replace(settings, **placed)


def settled_alone(settings: Settings) -> Settings:
    """The settings for one process: ``replicated`` where nothing was chosen, as nobody is there to share a model."""
    whole = {phase: choice(phase, "replicated") for phase in left_open(settings)}
    given = {phase: {"degree": getattr(settings, phase).get("degree")} for phase in whole}
    return settled(settings, {phase: {**whole[phase], **given[phase]} for phase in whole})
