"""How benchmarks keep their figures: as JSON, with the machine and the versions that they were made on and with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("deepspeed", "optuna", "numpy")
"""Beside those that an export names."""


def keep(result: Path, figures: Mapping[str, Any], gpu: bool = False) -> dict[str, Any]:
    """Write figures to a file, whole, and return what was written; with ``gpu`` the machine's is named."""
    from heretic_ds.export.manifest import package_versions  # with PyTorch, which orchestrating needs no sooner

    report = {**figures, "machine": machine(gpu), "versions": package_versions(PACKAGES)}
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
