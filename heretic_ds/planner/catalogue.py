"""What there is to choose from: placements by the files of ``conf/``, machines by those of ``conf/hardware/``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from omegaconf import OmegaConf

from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement
from heretic_ds.placements.costs import Machine
from heretic_ds.settings import conf_dir
from heretic_ds.settings.checks import find_class


def placements_for(phase: str) -> list[type[Placement]]:
    """The classes that the files of a phase's group name, those that serve the phase."""
    files: list[Any] = [OmegaConf.load(file) for file in sorted((conf_dir() / phase).glob("*.yaml"))]
    targets = [file.get("_target_") for file in files]
    kinds = [find_class(str(target), f"{phase}._target_", Placement) for target in targets if target]
    return [kind for kind in dict.fromkeys(kinds) if phase in kind.phases]


def machine_of(given: Mapping[str, Any]) -> Machine:
    """A machine by the values of one of ``conf/hardware/``'s files. Raises UserError that names what is wrong."""
    values: dict[str, Any] = {}
    for field in fields(Machine):
        value = given.get(field.name)
        if field.name in ("name", "device"):
            values[field.name] = str(value)
        elif value is None and field.default is not MISSING:
            continue
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            shown = "missing" if value is None else value
            raise UserError(f"hardware.{field.name} is {shown}; set it to a number above 0")
        else:
            whole = field.name in ("nodes", "devices_per_node")
            if whole and value != int(value):
                raise UserError(f"hardware.{field.name} is {value}; set it to a whole number")
            values[field.name] = int(value) if whole else float(value)
    if given.get("name") is None or values["device"] not in ("cpu", "cuda"):
        raise UserError("a machine needs hardware.name, and hardware.device, which is cpu or cuda")
    known = [field.name for field in fields(Machine)]
    unknown = sorted(set(map(str, given)) - {*known})
    if unknown:
        raise UserError(f"there is no setting hardware.{unknown[0]}; a machine has {', '.join(known)}")
    return Machine(**values)
