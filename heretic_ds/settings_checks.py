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

from heretic_ds.errors import UserError
from heretic_ds.settings import (
    AUTO,
    DTYPES,
    ROW_NORMS,
    TASKS,
    ProfileSettings,
    Settings,
)

_SIGNS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def validate(settings: Settings) -> None:
    """Checks what types alone cannot: ranges, names, and settings that exclude one another.

    Raises UserError for the first mistake found, naming the override to change. Whether files, data sets and
    classes exist is found out by those who load them.
    """
    checks = (_check_model, _check_numbers, _check_profiles, _check_fixed_edit)
    if settings.task.name not in TASKS:
        raise UserError(f"task.name is {settings.task.name!r}; choose one of {', '.join(TASKS)}")
    for check in checks:
        refuse(check(settings))


# What a check yields: whether the setting is fine, and what to say where it is not.
_Findings = Iterator[tuple[bool, str]]


def refuse(findings: _Findings) -> None:
    """Raise UserError for the first mistake among what checks found."""
    for holds, message in findings:
        if not holds:
            raise UserError(message)


def find_class(path: str, kind: type, setting: str) -> Any:
    """The class of a dotted path that a setting gives. Raises UserError where there is none, or none of this kind."""
    if os.getcwd() not in sys.path:  # a module in the working folder is found however the command was started
        sys.path.append(os.getcwd())
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting}: {path} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
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
    return limits.get("words") or " and ".join(f"{_SIGNS[sign]} {bound}" for sign, bound in limits.items())


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


def _check_model(settings: Settings) -> _Findings:
    model, ablation, scoring = settings.model, settings.ablation, settings.scoring
    yield bool(model.path.strip()), "model.path is empty; give a hub id or a local folder: heretic-ds <model>"
    yield model.dtype in DTYPES, f"model.dtype is {model.dtype!r}; choose one of {', '.join(DTYPES)}"
    device_known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", model.device) is not None
    yield device_known, f"model.device is {model.device!r}; choose auto, cpu, cuda or cuda:N"
    row_norm = ablation.row_norm
    yield row_norm in ROW_NORMS, f"ablation.row_norm is {row_norm!r}; choose one of {', '.join(ROW_NORMS)}"
    yield (
        bool(scoring.scorers),
        "scoring.scorers is empty; name at least one scorer, as in scoring.scorers=[refusals]",
    )


def _check_numbers(settings: Settings) -> _Findings:
    search, generation, export = settings.search, settings.generation, settings.export
    quantile = settings.direction.winsorize_quantile
    lower_bounds: tuple[tuple[str, float | None, int], ...] = (
        ("task.answer_tokens", settings.task.answer_tokens, 1),
        ("search.trials", search.trials, 1),
        ("search.startup_trials", search.startup_trials, 0),
        ("search.seed", search.seed, 0),
        ("generation.max_new_tokens", generation.max_new_tokens, 1),
        ("generation.batch_size", generation.batch_size, 0),
        ("export.trial", export.trial, 0),
    )
    for name, value, least in lower_bounds:
        yield value is None or value >= least, f"{name} is {value}; it has to be at least {least}"
    per_pass = str(search.trials_per_pass)
    counts = per_pass == AUTO or (per_pass.isdecimal() and int(per_pass) > 0)
    yield counts, f"search.trials_per_pass is {per_pass}; it has to be {AUTO}, or a whole number of at least 1"
    kl_target, max_kl = search.kl_target, export.max_kl
    yield 0 < kl_target < math.inf, f"search.kl_target is {kl_target}; it has to be a number above 0 (nats)"
    yield 0 < max_kl < math.inf, f"export.max_kl is {max_kl}; it has to be a finite number above 0 (nats)"
    yield 0 < quantile <= 1, f"direction.winsorize_quantile is {quantile}; it has to be above 0 and at most 1"


def _check_profiles(settings: Settings) -> _Findings:
    for component, profile in _profiles(settings).items():
        prefix = f"ablation.profiles.{component}"
        numbers = {entry.name: getattr(profile, entry.name) for entry in fields(profile)}
        missing = [name for name, value in numbers.items() if value is None]
        given = [name for name, value in numbers.items() if value is not None]
        complete = not missing or not given
        yield complete, f"{prefix} lacks {', '.join(missing)}; give all four numbers of a profile, or none"
        for name in given:
            yield (
                math.isfinite(numbers[name]),
                f"{prefix}.{name} is {numbers[name]}; it has to be a finite number",
            )
        distance = profile.min_weight_distance
        yield (
            distance is None or distance > 0,
            f"{prefix}.min_weight_distance is {distance}; it has to be above 0",
        )
    index = settings.ablation.direction_index
    in_range = index is None or 0 <= index < math.inf
    yield (
        in_range,
        f"ablation.direction_index is {index}; it has to be at least 0, or null for one direction a layer",
    )


def _check_fixed_edit(settings: Settings) -> _Findings:
    task, index = settings.task.name, settings.ablation.direction_index
    edited = [name for name, profile in _profiles(settings).items() if profile.max_weight is not None]
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


def _profiles(settings: Settings) -> dict[str, ProfileSettings]:
    """The fixed edit's profiles by component."""
    return {"attention": settings.ablation.profiles.attention, "mlp": settings.ablation.profiles.mlp}
