"""How benchmarks keep their figures: as JSON, with the machine and the versions that they were made on and with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("heretic-ds", "torch", "transformers", "deepspeed", "optuna", "numpy")


def keep(result: Path, figures: Mapping[str, Any], gpu: bool = False) -> dict[str, Any]:
    """Write figures to a file, whole, and return what was written; with ``gpu`` the machine's is named."""
    report = {**figures, "machine": machine(gpu), "versions": versions()}
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def machine(gpu: bool = False) -> dict[str, Any]:
    """What this process runs on, without names that lead to anybody."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {"system": platform.system(), "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    if gpu:
        import torch

        if torch.cuda.is_available():
            found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that was not installed
            found[package] = "not installed"
    return found
