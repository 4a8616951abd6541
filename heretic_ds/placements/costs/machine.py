"""Hardware as a plan sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LIBRARIES = 360 * 2**20
"""Host memory of a process that has imported what every job needs and read its prompts (x86, CPU build of PyTorch 2.13,
no extras installed). transformers imports scipy, scikit-learn, pandas and accelerate where they are installed: 500."""


@dataclass(frozen=True)
class Machine:
    """A description of hardware, as the files of ``conf/hardware/`` give it or as it was measured here."""

    name: str
    """What messages call it."""
    device: str
    """Kind of its devices: ``cpu`` or ``cuda``. A CPU's device is a share of its cores, one rank at work on it."""
    nodes: int
    """Computers."""
    devices_per_node: int
    """Devices of one computer."""
    device_memory: float
    """Bytes of one device; of a CPU's device its share of the host's memory."""
    host_memory: float
    """Bytes of host memory of one computer."""
    flops_16bit: float
    """Multiplications and additions a second of one device in 16 bits, dense, each counted."""
    flops_32bit: float
    """The same in float32."""
    memory_bandwidth: float
    """Bytes a second that a device reads of its own memory."""
    link_bandwidth: float
    """Bytes a second, in one direction, that a device sends to others of its computer."""
    link_latency: float
    """Seconds that the smallest message takes on that way."""
    network_bandwidth: float
    """Bytes a second, in one direction, that a device's share of the network between computers carries."""
    network_latency: float
    """Seconds that the smallest message takes on that way."""
    host_bandwidth: float
    """Bytes a second between a device and host memory."""
    disk_bandwidth: float
    """Bytes a second at which a computer reads files."""
    launch_seconds: float
    """What one operation costs before it computes anything: calling it, launching its kernel."""
    process_memory: float = LIBRARIES
    """Bytes of host memory that a rank takes before it holds any weights. What is imported depends on what is
    installed, so of this machine it is this process's own."""

    @property
    def devices(self) -> int:
        """Of all computers together."""
        return self.nodes * self.devices_per_node

    def flops(self, dtype: torch.dtype) -> float:
        """Multiplications and additions a second of one device."""
        return self.flops_16bit if dtype.itemsize <= 2 else self.flops_32bit


@dataclass(frozen=True)
class Resources:
    """The part of a machine that a job has: one device a rank, consecutive ranks on one computer."""

    machine: Machine
    ranks: int

    @property
    def on_cpu(self) -> bool:
        return self.machine.device == "cpu"

    def link(self, members: int) -> tuple[float, float]:
        """Bytes a second and latency of the slowest way within so many consecutive ranks."""
        machine = self.machine
        if members <= machine.devices_per_node:
            return machine.link_bandwidth, machine.link_latency
        return machine.network_bandwidth, machine.network_latency


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
