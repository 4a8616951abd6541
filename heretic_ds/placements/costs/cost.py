"""What a placement takes, in bytes and seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heretic_ds.placements.costs.facts import Facts
from heretic_ds.placements.costs.machine import Resources
from heretic_ds.placements.costs.memory import memory
from heretic_ds.placements.costs.seconds import of_phase
from heretic_ds.placements.costs.use import Use, rows_of


@dataclass(frozen=True)
class Cost:
    """What a placement takes: memory on the fullest rank at its fullest moment, and time."""

    bytes: Mapping[str, int]
    """Memory of a rank's device, by what lies in it. On a CPU it is the host's."""
    host: Mapping[str, int]
    """Memory of the host beside it, a rank, by what lies in it."""
    seconds: Mapping[str, float]
    """Time by phase: ``load``, ``capture`` of all prompts, one ``trial``."""
    batch: int
    """Rows a batch for which that is so."""

    def fits(self, resources: Resources) -> str | None:
        """None where that much memory is there, a tenth of it left free; else what is short."""
        machine, device, host = resources.machine, sum(self.bytes.values()), sum(self.host.values())
        ranks_here = min(resources.ranks, machine.devices_per_node)
        if resources.on_cpu:
            device, host = 0, device + host
        if device > USABLE * machine.device_memory:
            return f"needs {_gib(device)} of a device's {_gib(machine.device_memory)}{_SPARED}"
        if ranks_here * host > USABLE * machine.host_memory:
            return f"{ranks_here} ranks need {_gib(ranks_here * host)} of a host's {_gib(machine.host_memory)}{_SPARED}"
        return None


USABLE = 0.9
"""Part of a memory that a plan fills: estimates are off by some percent, and memory is never free to its last byte."""

_SPARED = ", a tenth of which stays free"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GiB"


def estimate(facts: Facts, resources: Resources, phase: str, use: Use) -> Cost:
    """Bytes and seconds of one phase."""
    device, host = memory(facts, resources, phase, use)
    return Cost(device, host, of_phase(facts, resources, phase, use), rows_of(facts, resources, phase, use))
