"""``task=plan``: what each placement would need of a model and take, on this machine or another. Reads no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.fitness import choose_device
from heretic_ds.checkpoint.open import ModelChoice
from heretic_ds.checkpoint.outline import Outline, outline_model
from heretic_ds.checkpoint.tokens import has_tokenizer, load_tokenizer
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import write_atomically
from heretic_ds.foreign.reading import path_of
from heretic_ds.job import Job
from heretic_ds.placements.costs import Machine, Work
from heretic_ds.planner import Plan
from heretic_ds.prompts import KINDS, PARTS, ChatFormat, load_prompts
from heretic_ds.prompts.sources import PACKAGE_SCHEME
from heretic_ds.report.console import say
from heretic_ds.report.plans import machine_line, phase_table
from heretic_ds.settings import PHASES, PromptSource, Settings
from heretic_ds.stages.placing import described_machine, machine_for, plan_of, why_nothing
from heretic_ds.world import World

USUAL_PROMPTS = {"train": 400, "eval": 100}
"""Prompts of each kind where reading them would take a network: as many as the default data sets are cut to."""


def make_and_show_plan(settings: Settings, world: World, console: Console) -> None:
    """Print the plan for a model, and write it to ``plan.json``.

    Under a launcher it is for the ranks that there are, else for all devices of the machine. Raises UserError, once the
    tables are printed, where the machine cannot hold the model.
    """
    world.agree(lambda: _refuse_unwritable(settings))
    described = described_machine(settings)
    device = torch.device(described.device) if described else world.agree(lambda: choose_device(settings.model.device))
    outline = world.agree(lambda: outline_model(ModelChoice(**asdict(settings.model)), device), "reading headers")
    machine = machine_for(settings, device, world)
    ranks = world.size if world.size > 1 and described is None else machine.devices
    world.decide(lambda: _show(settings, _plan(settings, outline, machine, ranks), console), "planning")


def _plan(settings: Settings, outline: Outline, machine: Machine, ranks: int) -> Plan:
    nobody: Any = None  # talks to the model
    job = Job(settings, World(0, ranks), outline, find_anatomy(outline.skeleton()), nobody, [])
    return plan_of(job, machine, ranks, prompt_lengths(settings, outline))


def prompt_lengths(settings: Settings, outline: Outline) -> dict[str, list[int]]:
    """Lengths in tokens of the prompts, by kind and part (``target.train``), as far as they can be told offline.

    Prompts in files are counted, and their tokens where the model's folder has a tokenizer; of data sets on the hub the
    rows that ``slice`` names. For all else stand :data:`USUAL_PROMPTS`, and the lengths that ``Work`` has.
    """
    sources = {(kind, part): getattr(getattr(settings.prompts, kind), part) for kind in KINDS for part in PARTS}
    texts = {
        key: load_prompts(source, f"prompts.{'.'.join(key)}") for key, source in sources.items() if _is_here(source)
    }
    encode = _encoder(settings, outline) if texts else None
    lengths = {}
    for (kind, part), source in sources.items():
        found = texts.get((kind, part))
        if found is None or encode is None:
            count = _rows(source, USUAL_PROMPTS[part]) if found is None else len(found)
            lengths[f"{kind}.{part}"] = [Work.longest_prompt] + [round(Work.prompt_tokens)] * (count - 1)
        else:
            lengths[f"{kind}.{part}"] = [len(encode(text)) for text in found]
    return lengths


def _encoder(settings: Settings, outline: Outline) -> Any:
    """Token ids of a prompt in its chat format; None where the model's folder has no tokenizer, or no format."""
    folder = outline.source.folder
    tokenizer = load_tokenizer(folder, settings.model.trust_remote_code) if has_tokenizer(folder) else None
    formatted = tokenizer is not None and (tokenizer.chat_template is not None or settings.prompts.template is not None)
    return ChatFormat(tokenizer, settings.prompts).encode if tokenizer is not None and formatted else None


def _is_here(source: PromptSource) -> bool:
    return source.source.startswith(PACKAGE_SCHEME) or path_of(source.source, "prompts").is_file()


def _rows(source: PromptSource, usual: int) -> int:
    """How many rows ``slice=start:stop`` keeps; ``usual`` where that depends on how many there are."""
    start, _, stop = (source.slice or "").partition(":")
    if not stop.isdecimal() or not (start or "0").isdecimal():
        return usual
    return max(int(stop) - int(start or 0), 1)


def _refuse_unwritable(settings: Settings) -> None:
    """Find out before planning that the plan cannot be written."""
    file = settings.plan.json
    if file is None:
        return
    path = path_of(file, "plan.json")
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder"
        raise UserError(f"plan.json={file} {reason}; set plan.json to a file in an existing folder")


def _show(settings: Settings, plan: Plan, console: Console) -> None:
    say(console, machine_line(plan))
    for phase in PHASES:
        console.print(phase_table(plan, phase, console.width), highlight=False)
    if settings.plan.json is not None:
        file = path_of(settings.plan.json, "plan.json")
        write_atomically(file, json.dumps(plan.as_json(), indent=1) + "\n", "plan.json")
    if problem := why_nothing(plan):
        raise UserError(problem)
    say(console, plan.sentence)
