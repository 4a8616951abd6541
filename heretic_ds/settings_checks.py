"""What types alone cannot say of settings: ranges, names, and those that exclude one another."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from heretic_ds.errors import UserError
from heretic_ds.settings import AUTO, PLACEMENTS, Settings

_SIGNS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def validate(settings: Settings) -> None:
    """Checks what types alone cannot: ranges, names, and settings that exclude one another.

    Raises UserError for the first mistake found, naming the override to change. Whether files, data sets and
    classes exist is found out by those who load them.
    """
    for check in (_check_fields, _check_rest, _check_placements, _check_offload, _check_profiles, _check_fixed_edit):
        for holds, message in check(settings):
            if not holds:
                raise UserError(message)


# What a check yields: whether the setting is fine, and what to say where it is not.
_Findings = Iterator[tuple[bool, str]]


def limits_in_words(limits: Mapping[str, Any]) -> str:
    """What a field takes beyond its type, see :func:`heretic_ds.settings.within`; empty where that is anything."""
    if "choices" in limits:
        return f"one of {', '.join(limits['choices'])}"
    bounds = (f"{word} {limits[sign]}" for sign, word in _SIGNS.items() if math.isfinite(limits.get(sign, math.inf)))
    return limits.get("words") or " and ".join(bounds)


def _check_fields(section: Any, prefix: str = "") -> _Findings:
    """Every field's own limits, those of nested sections included."""
    for entry in fields(section):
        name, value, limits = prefix + entry.name, getattr(section, entry.name), entry.metadata
        if is_dataclass(value):
            yield from _check_fields(value, f"{name}.")
        elif value is not None and "choices" in limits:
            yield value in limits["choices"], f"{name} is {value!r}; choose {limits_in_words(limits)}"
        elif value is not None:
            fits = all(getattr(operator, sign)(value, limits[sign]) for sign in _SIGNS if sign in limits)
            yield fits, f"{name} is {value}; it has to be {limits_in_words(limits)}"


def _check_rest(settings: Settings) -> _Findings:
    device, per_pass = settings.model.device, str(settings.search.trials_per_pass)
    given, named = bool(settings.model.path.strip()), bool(settings.scoring.scorers)
    yield given, "model.path is empty; give a hub id or a local folder: heretic-ds <model>"
    device_known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is not None
    yield device_known, f"model.device is {device!r}; choose auto, cpu, cuda or cuda:N"
    yield named, "scoring.scorers is empty; name at least one scorer, as in scoring.scorers=[refusals]"
    counts = per_pass == AUTO or (per_pass.isdecimal() and int(per_pass) > 0)
    yield counts, f"search.trials_per_pass is {per_pass}; it has to be {AUTO}, or a whole number of at least 1"


def _check_placements(settings: Settings) -> _Findings:
    for phase, chosen in (("capture", settings.capture), ("evaluate", settings.evaluate)):
        known = chosen.placement in PLACEMENTS[phase]
        yield known, f"{phase}.placement is {chosen.placement!r}; choose one of {', '.join(PLACEMENTS[phase])}"
        whole = chosen.degree in (None, 1) or chosen.placement != "replicated"
        yield whole, f"{phase}.degree is {chosen.degree}, but a replicated model lies on one rank; leave it null"


def _check_offload(settings: Settings) -> _Findings:
    capture = settings.capture
    offload, path = capture.offload, capture.nvme_path
    served = offload == "none" or capture.placement == "zero3"
    yield served, f"capture.offload={offload} is for capture=zero3 alone, but capture is {capture.placement}"
    has_path = offload != "nvme" or path is not None
    yield has_path, "capture.offload=nvme needs capture.nvme_path, a folder on a fast local disk"
    yield path is None or offload == "nvme", "capture.nvme_path is set without capture.offload=nvme, so nothing uses it"


def _check_profiles(settings: Settings) -> _Findings:
    for component, profile in vars(settings.ablation.profiles).items():
        prefix = f"ablation.profiles.{component}"
        missing = [entry.name for entry in fields(profile) if getattr(profile, entry.name) is None]
        complete = len(missing) in (0, len(fields(profile)))
        yield complete, f"{prefix} lacks {', '.join(missing)}; give all four numbers of a profile, or none"
        distance = profile.min_weight_distance
        above = distance is None or distance > 0
        yield above, f"{prefix}.min_weight_distance is {distance}; it has to be above 0"


def _check_fixed_edit(settings: Settings) -> _Findings:
    task, index = settings.task.name, settings.ablation.direction_index
    edited = [name for name, profile in vars(settings.ablation.profiles).items() if profile.max_weight is not None]
    fixed = [f"ablation.profiles.{name}" for name in edited]
    if index is not None:
        fixed.append("ablation.direction_index")
    if task == "abliterate" and fixed:
        yield (
            False,
            f"{fixed[0]} is set, but task=abliterate searches for it; leave it null, or choose task=evaluate",
        )
    effective = index is None or bool(edited)
    yield effective, "ablation.direction_index is set without ablation.profiles, so nothing would be edited"
    trial, trials = settings.export.trial, settings.search.trials
    yield (
        task != "abliterate" or trial is None or trial < trials,
        f"export.trial is {trial}, but search.trials={trials} ends with trial {trials - 1}; choose one of 0 to "
        f"{trials - 1}, or raise search.trials",
    )
    yield (
        task != "evaluate" or trial is None,
        "export.trial is set, but task=evaluate scores the fixed edit of ablation.*; copy the trial's numbers from "
        "results.json into ablation.profiles and ablation.direction_index, or leave export.trial null",
    )
    both = task in ("export", "chat") and trial is not None and bool(edited)
    yield not both, f"export.trial and ablation.profiles both name an edit for task={task}; give only one of them"
