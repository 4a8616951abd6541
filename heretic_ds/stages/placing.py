"""Settling ``capture=auto`` and ``evaluate=auto`` when a run is opened; a run that is resumed keeps what it had."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from heretic_ds.checkpoint import TensorFiles
from heretic_ds.checkpoint.outline import Outline
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.placements import Placement, left_open, placements_of, settled
from heretic_ds.placements.costs import Machine
from heretic_ds.planner import Candidate, Plan, facts_of, machine_here, machine_of, make_plan, placements_for
from heretic_ds.prompts import TESTS
from heretic_ds.run_folder import read_measured
from heretic_ds.settings import PHASES, Settings
from heretic_ds.world import World

log = logging.getLogger(__name__)

LOCAL = "local"
"""Name of the machine that this process runs on."""
KEPT_AS = "placements"
"""Where a choice stands among what a run folder remembers."""


def settle_placements(job: Job, folder: Path, given: str = "as given") -> dict[str, Any]:
    """Name the placements that the job's settings leave open; every rank takes part, before any weight is read.

    Where they leave none open, ``given`` says why.

    They are what the run ``folder`` says that an earlier command took, where as many ranks on such devices were asked
    the same, else what the planner chooses. Returns what the folder has to remember. Raises UserError where nothing
    fits.
    """
    world, asked = job.world, {phase: dict(getattr(job.settings, phase)) for phase in PHASES}
    if not left_open(job.settings):
        log.info("%s, %s", _named(job), given)
        return {}
    circumstances = {"ranks": world.size, "device": _device_name(job.opened.device), "asked": asked}
    kept = world.decide(lambda: _kept(folder, circumstances))
    choice = kept or {**circumstances, **_choose(job)}
    job.settings = settled(job.settings, choice["chosen"])
    log.info("%s", f"{_named(job)}, as when this run began" if kept else choice["why"])
    return {KEPT_AS: choice}


def refuse_unverifiable_adapter(job: Job) -> None:
    """An adapter that leaves something out has to be scored on the original, which takes the whole of it."""
    settings = job.settings
    full = settings.export.format != "model" and settings.ablation.row_norm == "full"
    if full and settings.task.name in ("abliterate", "export"):
        placement = placements_of(settings)["evaluate"]
        if not placement.resident:
            raise UserError(
                f"export.format={settings.export.format} with ablation.row_norm=full makes an adapter that has to be "
                f"scored on a whole model, which evaluate={placement.name} does not hold; set evaluate=replicated, "
                "export.format=model, or ablation.row_norm=pre, whose adapters are exact"
            )


def tell_of_nothing_to_share(job: Job) -> None:
    """Say that ``load.share`` does nothing, where it does nothing."""
    whole = any(placement.whole for placement in placements_of(job.settings).values())
    if job.settings.load.share and (job.world.size == 1 or not whole):
        why = "there is one rank" if job.world.size == 1 else "each rank reads its own part of the model anyway"
        log.info("load.share=true does nothing: %s", why)


def _kept(folder: Path, circumstances: Mapping[str, Any]) -> dict[str, Any] | None:
    """The choice of an earlier run in the folder; None where there is none, or where it was made for something else."""
    kept = read_measured(folder).get(KEPT_AS)
    if kept is None or not {"chosen", "why"} <= kept.keys():
        return None
    changed = [name for name, value in circumstances.items() if kept.get(name) != value]
    if not changed:
        return dict(kept)
    if "asked" not in changed:
        before = f"{kept.get('ranks')} ranks on {kept.get('device')}"
        now = f"{circumstances['ranks']} on {circumstances['device']}"
        log.info("this run's placements were chosen for %s, and are chosen anew for %s", before, now)
    return None


def _choose(job: Job) -> dict[str, Any]:
    """The planner's choice for a job's ranks, and the sentence that says why."""
    world = job.world
    machine = machine_for(job.settings, job.opened.device, world)
    searched = [name for name in job.texts if name not in TESTS]

    def choose() -> dict[str, Any]:
        plan = plan_of(job, machine, world.size, {name: _lengths(job, name) for name in searched})
        if problem := why_nothing(plan):
            raise UserError(f"{problem}; to try all the same, name placements for capture and evaluate")
        return {"chosen": {phase: _mapping(each) for phase, each in plan.chosen.items()}, "why": plan.sentence}

    return world.decide(choose, "choosing placements")


def plan_of(job: Job, machine: Machine, ranks: int, lengths: Mapping[str, Sequence[int]] | None) -> Plan:
    """The plan for a job, of whose settings only what they leave open is chosen; reads no weights.

    Where the weights are here they decide too: parts of files that are no safetensors cannot be read.
    """
    outline = job.opened if isinstance(job.opened, Outline) else Outline.of(job.opened)

    def check(placement: Placement, on: int) -> None:
        if not placement.whole and outline is not job.opened:
            TensorFiles(outline.source.folder, outline.headers)
        placement.check(replace(job, opened=outline, world=job.world if on == ranks else World(0, on)))

    for phase in left_open(job.settings):
        job.world.degree(placements_of(job.settings)[phase].options.degree, f"{phase}.degree")
    choice = {phase: _choices(job.settings, phase) for phase in PHASES}
    plan = make_plan(facts_of(outline, job.anatomy, job.settings, lengths), machine, ranks, choice, check)
    checked = [_checked(candidate, lambda made: check(made, ranks)) for candidate in plan.candidates]
    return replace(plan, candidates=checked)


def _checked(candidate: Candidate, check: Callable[[Placement], None]) -> Candidate:
    """A candidate that fits and that the job cannot have says so; the planner asks only for those it would choose."""
    if not candidate.fits or candidate.made is None:
        return candidate
    try:
        check(candidate.made)
    except UserError as error:
        return replace(candidate, fits=False, why=str(error))
    return candidate


def _choices(settings: Settings, phase: str) -> Sequence[type[Placement] | Placement]:
    """What a phase can be placed by: classes to try out, or placements with the options that the settings give."""
    given = placements_of(settings)[phase]
    if phase not in left_open(settings):
        return [given]
    kinds, degree = [kind for kind in placements_for(phase) if kind is not type(given)], given.options.degree
    if degree is None:
        return kinds
    return [kind(phase, kind.Options(degree=degree)) for kind in kinds if not kind.whole or degree == 1]


def why_nothing(plan: Plan) -> str | None:
    """Where a plan chooses nothing for a phase, why: what is short, or what refuses the model. None where it does."""
    for phase, chosen in plan.chosen.items():
        candidates = [each for each in plan.candidates if each.phase == phase]
        short = [each for each in candidates if each.cost is not None and math.isinf(each.seconds)]
        if chosen is None and candidates and not short:
            nearest = min(candidates, key=lambda each: math.isinf(each.seconds))  # it would fit
            return f"no placement for {phase} serves {plan.model}: {nearest.why}"
    return None if all(plan.chosen.values()) else plan.sentence


def _mapping(candidate: Candidate | None) -> dict[str, Any]:
    """What a plan chose, as settings name a placement."""
    if candidate is None or candidate.made is None:
        raise RuntimeError("the planner chose no placement that was made")
    kind = type(candidate.made)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(candidate.made.options)}


def machine_for(settings: Settings, device: torch.device, world: World) -> Machine:
    """The machine that ``hardware`` describes; of this one, what is not given is measured. Every rank takes part."""
    described = described_machine(settings)
    return described or machine_of({**asdict(machine_here(device, world)), **_given(settings)})


def described_machine(settings: Settings) -> Machine | None:
    """The machine that ``hardware`` describes, None for this one. Raises UserError for a description with mistakes."""
    given = _given(settings)
    if given.get("name", LOCAL) != LOCAL or (given and "name" not in given):
        return machine_of(given)
    anything = {entry.name: 1 for entry in fields(Machine)}
    machine_of({**anything, "device": "cpu", "name": LOCAL, **given})
    return None


def _given(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in settings.hardware.items() if value is not None}


def _lengths(job: Job, name: str) -> list[int]:
    return [len(row) for row in job.prompts(name).rows]


def _named(job: Job) -> str:
    """The job's placements as overrides: ``capture=zero3 evaluate=tensor_parallel``."""
    return " ".join(f"{phase}={placement.name}" for phase, placement in placements_of(job.settings).items())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
