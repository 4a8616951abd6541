"""``hardware=local``: this machine's rates, measured in some seconds and kept in the user's cache folder.

Rates are those that PyTorch reaches here with as many threads as this process has: a plan for other thread counts, or
another PyTorch, measures anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import read_json
from heretic_ds.memory import give_back_memory, host_memory, resident_memory, wait_for
from heretic_ds.placements.costs import Machine
from heretic_ds.planner.catalogue import machine_of
from heretic_ds.planner.here import processor
from heretic_ds.world import World

log = logging.getLogger(__name__)

_LEAST_SECONDS, _MOST_SECONDS = 0.15, 0.8
"""Of one measurement: repeated until the first has passed, ended when the second has."""
_MATRIX = {"cpu": 1024, "cuda": 8192}
_STREAM_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Memory that is read to measure its bandwidth: more than caches hold."""
_MESSAGE = 2**22
"""Bytes of a sum over ranks whose bandwidth is measured."""
_SHARE_OF_CARRIED = 0.5
"""Without ranks: bytes that two processes of a CPU exchange beside those that memory carries; each is copied twice."""
_LATENCY_GUESS = {"cpu": 1e-4, "cuda": 2e-5}
"""Seconds of a small message where there are no ranks to measure it: gloo's and NCCL's, as they were met."""
_LEAST_LATENCY = 1e-6
_DISK_GUESS = 1e9
"""Bytes a second: what is in the page cache is read faster, and nothing here may empty it."""


def machine_here(device: torch.device, world: World | None = None) -> Machine:
    """This machine: as it was measured before, else measured now. All ranks of a ``world`` have to call it.

    What a rank takes before it holds weights is what these take now, so whatever is imported has to be imported before.
    """
    world = world or World()
    threads, ranks = torch.get_num_threads(), world.size
    key = _key(device, threads, ranks)
    file = cache_folder() / f"machine-{key}.json"
    known = world.decide(lambda: _load(file))
    if known is None:
        started = time.perf_counter()
        values = _measure(device, world)
        known = world.decide(lambda: _kept(file, values))
        log.info("measured this machine in %.1f s; kept in %s", time.perf_counter() - started, file)
    return replace(known, process_memory=float(max(world.gather(resident_memory()))))


def cache_folder() -> Path:
    """Where measurements are kept: below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heretic_ds"


def this_machine(device: torch.device) -> list[str | int | None]:
    """What tells this machine from others, and from itself with another device or other memory granted."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    count = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count()
    return [platform.node(), name, count, host_memory()]


def keep_in_cache(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file of the cache folder in one step; a folder that takes none is no more than a warning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as whole:
            whole.write(json.dumps(content, indent=1))
        os.replace(whole.name, file)
    except OSError as error:
        log.warning("what was measured cannot be kept in %s: %s", file.parent, error)


def _key(device: torch.device, threads: int, ranks: int) -> str:
    here = os.environ.get("LOCAL_WORLD_SIZE", ranks)
    told = [*this_machine(device), torch.__version__, threads, ranks, here, sorted(Machine.__dataclass_fields__)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _load(file: Path) -> Machine | None:
    """What is kept; None where there is nothing, or nothing that makes a machine."""
    try:
        return machine_of(read_json(file)) if os.path.exists(file) else None
    except UserError as error:
        log.warning("%s is damaged (%s): this machine is measured anew", file, error)
        return None


def _kept(file: Path, values: dict[str, Any]) -> Machine:
    machine = machine_of(values)
    keep_in_cache(file, asdict(machine))
    return machine


def _measure(device: torch.device, world: World) -> dict[str, Any]:
    """All rates; every rank measures at the same time, since that is how they will work, and the slowest counts."""
    on_cuda = device.type == "cuda"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    host = float(host_memory())
    devices = torch.cuda.device_count() if on_cuda else max(1, local)
    memory = float(torch.cuda.mem_get_info(device)[1]) if on_cuda else host / devices
    mine = {
        "flops_16bit": _matmul_rate(device, torch.bfloat16),
        "flops_32bit": _matmul_rate(device, torch.float32),
        "memory_bandwidth": _read_rate(device),
        "host_bandwidth": _copy_rate(device),
        "launch_seconds": _launch_seconds(device),
    }
    everyone = world.gather(mine)
    rates = {name: min(each[name] for each in everyone) for name in mine}
    rates["launch_seconds"] = max(each["launch_seconds"] for each in everyone)
    give_back_memory()  # on the host it would count as what this process takes anyway
    inside = world.machine()
    network = _link(device, world, dist.group.WORLD if world.size > 1 else None)
    link = network if inside.most in (1, world.size) else _link(device, world, inside.group)
    carried = link[0] or _between_devices(device) or _SHARE_OF_CARRIED * rates["memory_bandwidth"]
    return {
        "name": "local",
        "device": device.type,
        "nodes": max(1, world.size // max(1, local)),
        "devices_per_node": devices,
        "device_memory": memory,
        "host_memory": host,
        **rates,
        "link_bandwidth": carried,
        "link_latency": link[1],
        "network_bandwidth": network[0] or carried,
        "network_latency": network[1],
        "disk_bandwidth": _DISK_GUESS,
    }


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a product of matrices."""
    size = _MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device)


def _read_rate(device: torch.device) -> float:
    """Bytes a second of a vector's product with a matrix that no cache holds: what a step of decoding does."""
    size = _STREAM_BYTES[device.type]
    columns = 4096
    matrix = torch.zeros(size // 4 // columns, columns, device=device)
    vector = torch.ones(columns, device=device)
    return size / _seconds(lambda: matrix @ vector, device)


def _copy_rate(device: torch.device) -> float:
    """Bytes a second between host and device; on a CPU from memory to memory."""
    size = 2**26
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _launch_seconds(device: torch.device) -> float:
    """What an operation on hardly any numbers takes, called as a model's modules call theirs."""
    few, linear = torch.ones(8, 8, device=device), torch.nn.Linear(8, 8, device=device)

    def many() -> Tensor:
        result = few
        for _ in range(50):
            result = torch.nn.functional.silu(linear(result)) + few
        return result

    with torch.inference_mode():
        return _seconds(many, device) / 150


def _between_devices(device: torch.device) -> float | None:
    """Bytes a second from one GPU to the next; None where there is no next one. (Not yet run on GPUs.)"""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    source = torch.zeros(2**26, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    return source.numel() / _seconds(lambda: target.copy_(source), torch.device("cuda:1"))


def _link(device: torch.device, world: World, group: dist.ProcessGroup | None) -> tuple[float | None, float]:
    """Bytes a second that each rank of a group sends in a sum over it, None without one; seconds of the smallest.

    Every rank of the world calls it, with the group that it is in, None for one that is alone; the slowest counts.
    """
    if world.size == 1:
        return None, _LATENCY_GUESS[device.type]
    rate, latency = math.inf, 0.0
    if group is not None:
        small, large, ranks = torch.zeros(1, device=device), torch.zeros(_MESSAGE // 4, device=device), group.size()
        latency = max(_rounds(small, device, 40, group) - _rounds(None, device, 40, group), _LEAST_LATENCY)
        seconds = max(_rounds(large, device, 5, group) - _rounds(small, device, 5, group), 1e-9)
        rate = 2 * _MESSAGE * (ranks - 1) / ranks / seconds
    told = world.gather((rate, latency))
    return min(rate for rate, _ in told), max(each for _, each in told)


def _rounds(tensor: Tensor | None, device: torch.device, count: int, group: dist.ProcessGroup) -> float:
    """Seconds of a little work and, with a tensor, one sum over the ranks of a group; equally many on each.

    Between sums a model computes: ranks that share cores come to them at different times, and wait.
    """
    some = torch.ones(256, 256, device=device)

    def one() -> None:
        some @ some
        if tensor is not None:
            dist.all_reduce(tensor, group=group)

    one()
    wait_for(device)
    started = time.perf_counter()
    for _ in range(count):
        one()
    wait_for(device)
    return (time.perf_counter() - started) / count


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs, the first of which, that sets things up, is not counted."""
    work()
    wait_for(device)
    found: list[float] = []
    while not found or sum(found) < _LEAST_SECONDS or (len(found) < 3 and sum(found) < _MOST_SECONDS):
        started = time.perf_counter()
        work()
        wait_for(device)
        found.append(time.perf_counter() - started)
    return min(found)
