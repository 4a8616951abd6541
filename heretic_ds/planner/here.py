"""What a run ran on: operating system, processor, memory, GPUs. No names of hosts or users."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch


def describe_machine() -> dict[str, Any]:
    """This machine, as ``results.json`` keeps it: ``memory_bytes`` of the host, ``gpus`` that this process can use."""
    cuda = torch.cuda.is_available()
    return {
        "os": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device that a rank computes on: what it is called, and its memory where it has its own; its threads on a
    CPU."""
    if device.type != "cuda":
        return {"device": str(device), "threads": torch.get_num_threads()}
    name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    return {"device": str(device), "name": name, "memory_bytes": memory}


def processor() -> str:
    """The processor's model, where the system tells it; else its architecture."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
