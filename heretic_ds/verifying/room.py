"""Room in memory for weights that are not packed in few bits, which final scores are taken on where it is there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from heretic_ds.checkpoint import bnb
from heretic_ds.job import Job
from heretic_ds.memory import free_on_host

_TAKEN = 1.5
"""Memory that a model takes while it is scored, in multiples of its weights."""
_DEVICE = re.compile(r"cpu|cuda(:\d{1,4})?")
LACKED = "lacked"
"""The entry of final scores that says what they would have taken on weights that are not packed."""


@dataclass(frozen=True)
class Room:
    """Memory of a device, in bytes; of the host that which all ranks of a machine take together."""

    device: str
    bytes: int

    @classmethod
    def of(cls, job: Job) -> Room:
        """What a job's model takes while it is scored, were it not packed. All ranks ask."""
        opened, world = job.opened, job.world
        numbers = sum(parameter.numel() for parameter in opened.skeleton().parameters())
        sharers = world.machine().most if opened.device.type == "cpu" and world.size > 1 else 1
        return cls(str(opened.device), int(_TAKEN * numbers * opened.dtypes[0].itemsize) * sharers)

    def is_there(self) -> bool:
        """Whether so much is free; of a device that is not here this cannot be said, and the answer is yes."""
        device = torch.device(self.device)
        if device.type == "cpu":
            return self.bytes <= free_on_host()
        here = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        return not here or self.bytes <= torch.cuda.mem_get_info(device)[0]

    def to_dict(self) -> dict[str, Any]:
        """In the form of JSON, as :func:`may_be_taken_anew` reads it."""
        return asdict(self)


def taken_packed(final: Mapping[str, Any]) -> bool:
    """Whether final scores are of weights in few bits, for want of memory: exports are not packed."""
    return bool(final.get("quantization", bnb.NONE) != bnb.NONE)


def may_be_taken_anew(final: Mapping[str, Any] | None) -> bool:
    """Whether final scores (the entry ``final`` of ``results.json``) are of packed weights, and there is room for
    others now; yes, too, where they do not say how much room it takes."""
    if final is None or not taken_packed(final):
        return False
    lacked = final.get(LACKED)
    device, size = (lacked.get("device"), lacked.get("bytes")) if isinstance(lacked, dict) else (None, None)
    if not (isinstance(device, str) and _DEVICE.fullmatch(device) and isinstance(size, int)):
        return True
    return Room(device, size).is_there()
