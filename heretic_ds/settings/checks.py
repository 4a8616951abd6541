"""What types alone cannot say of settings: ranges, names, and those that exclude one another."""

from __future__ import annotations

import importlib
import math
import operator
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin
from urllib.parse import urlsplit

from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import reason
from heretic_ds.settings import AUTO, Settings
from heretic_ds.settings.directions import MANY
from heretic_ds.settings.export import SIZE
from heretic_ds.settings.tracking import TrackingSettings
from heretic_ds.settings.verifying import AUTO_TEST, NO_TEST

_WITHOUT_URI = ("none", "tensorboard", "trackio", "wandb")
_SIGNS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def validate(settings: Settings) -> None:
    """Checks what types alone cannot: ranges, names, and settings that exclude one another.

    Raises UserError for the first mistake found, naming the override to change. Whether files, data sets and
    classes exist is found out by those who load them.
    """
    for check in (check_fields, _check_rest, _check_directions, _check_export, _check_profiles, _check_fixed_edit):
        refuse(check(settings))


# What a check yields: whether the setting is fine, and what to say where it is not.
_Findings = Iterator[tuple[bool, str]]


def refuse(findings: _Findings) -> None:
    """Raise UserError for the first mistake among what checks found."""
    for holds, message in findings:
        if not holds:
            raise UserError(message)


def find_class(path: str, setting: str, kind: type, *others: type) -> Any:
    """The class of a dotted path that a setting gives. Raises UserError where there is none, or none of these kinds."""
    if os.getcwd() not in sys.path:  # a module in the working folder is found however the command was started
        sys.path.append(os.getcwd())
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module's own code runs here
        raise UserError(f"{setting}: {path} cannot be imported: {reason(error)}") from error
    if not (isinstance(found, type) and issubclass(found, (kind, *others))):
        package = kind.__module__.removesuffix(".base")
        raise UserError(f"{setting}: {path} is not a class derived from {package}.{kind.__name__}")
    return found


def type_name(hint: Any) -> str:
    """What a setting of this type takes, in words."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(argument for argument in get_args(hint) if argument is not type(None))
        return f"{type_name(inner)}, or null"
    if get_origin(hint) is list:
        [item] = get_args(hint)
        names = ", ".join(f"{entry.name}: ..." for entry in fields(item)) if is_dataclass(item) else ""
        return f"a list of {{{names}}}" if names else "a list, as in [a,b]"
    return _TYPE_NAMES.get(hint, "a group of settings")


def limits_in_words(limits: Mapping[str, Any]) -> str:
    """What a field takes beyond its type, see :func:`heretic_ds.settings.within`; empty where that is anything."""
    if "choices" in limits:
        return f"one of {', '.join(limits['choices'])}"
    bounds = (f"{word} {limits[sign]}" for sign, word in _SIGNS.items() if math.isfinite(limits.get(sign, math.inf)))
    return limits.get("words") or " and ".join(bounds)


def check_fields(section: Any, prefix: str = "") -> _Findings:
    """Every field's own limits, those of nested sections included."""
    for entry in fields(section):
        name, value, limits = prefix + entry.name, getattr(section, entry.name), entry.metadata
        if is_dataclass(value):
            yield from check_fields(value, f"{name}.")
        elif value is not None and "choices" in limits:
            yield value in limits["choices"], f"{name} is {value!r}; choose {limits_in_words(limits)}"
        elif value is not None:
            fits = all(getattr(operator, sign)(value, limits[sign]) for sign in _SIGNS if sign in limits)
            yield fits, f"{name} is {value}; it has to be {limits_in_words(limits)}"


def _check_rest(settings: Settings) -> _Findings:
    device, per_pass = settings.model.device, str(settings.search.trials_per_pass)
    yield (
        settings.plan.json is None or settings.task.name == "plan",
        f"plan.json is set, but task={settings.task.name} makes no plan to write; leave it null, or choose task=plan",
    )
    yield (
        "/" not in (settings.model.attn_implementation or "") or settings.model.trust_remote_code,
        f"model.attn_implementation={settings.model.attn_implementation} is code on the hub; set "
        "model.trust_remote_code=true if you trust its author, or choose eager or sdpa",
    )
    given, named = bool(settings.model.path.strip()), bool(settings.scoring.scorers)
    yield given, "model.path is empty; give a hub id or a local folder: heretic-ds <model>"
    device_known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is not None
    yield device_known, f"model.device is {device!r}; choose auto, cpu, cuda or cuda:N"
    yield named, "scoring.scorers is empty; name at least one scorer, as in scoring.scorers=[refusals]"
    launch = AUTO if settings.run.launch is None else settings.run.launch
    for key, value in (("search.trials_per_pass", per_pass), ("run.launch", launch)):
        counts = value == AUTO or (value.isdecimal() and int(value) > 0)
        yield counts, f"{key} is {value}; it has to be {AUTO}, or a whole number of at least 1"
    for kind, test in (("target", settings.prompts.target.test), ("baseline", settings.prompts.baseline.test)):
        yield (
            test.source not in (AUTO_TEST, NO_TEST) or (test.slice is None and test.subset is None),
            f"prompts.{kind}.test.source is {test.source}, so nothing of it can be chosen; set "
            f"prompts.{kind}.test.source too, or leave prompts.{kind}.test.slice and .subset null",
        )
    yield from _check_tracking(settings.tracking)


def _check_tracking(tracking: TrackingSettings) -> _Findings:
    yield bool(tracking.project.strip()), "tracking.project is empty; give a name"
    yield (
        tracking.uri is None or tracking.name not in _WITHOUT_URI,
        f"tracking.uri is for tracking=mlflow, but tracking is {tracking.name}; leave it null",
    )
    yield (
        "@" not in urlsplit(tracking.uri or "").netloc,
        "tracking.uri holds a user or a password, which would be kept in the run folder; give them as "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )


def _check_directions(settings: Settings) -> _Findings:
    rank, method = settings.ablation.rank, settings.direction.method
    yield (
        rank == 1 or method in MANY,
        f"ablation.rank is {rank}, but direction.method={method} finds one direction a layer; set "
        f"direction.method={MANY[0]}, or ablation.rank=1",
    )


def _check_export(settings: Settings) -> _Findings:
    size, form = settings.export.max_shard_size, settings.export.format
    fits = size is None or re.fullmatch(SIZE, size.strip()) is not None
    yield fits, f"export.max_shard_size is {size!r}; give a number with KB, MB, GB or TB, as in 5GB"
    whole = not settings.export.gguf or form != "adapter"
    yield whole, "export.gguf=true converts a whole model; set export.format=model or both"


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
    against = settings.task.against
    yield (
        against is None or (task == "evaluate" and not fixed),
        f"evaluate.against={against} compares two models as they are; it is for task=evaluate without an edit",
    )
    both = task in ("export", "chat") and trial is not None and bool(edited)
    yield not both, f"export.trial and ablation.profiles both name an edit for task={task}; give only one of them"
