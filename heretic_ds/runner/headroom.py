"""How many rows a batch may have, told from the memory of small ones: where running out cannot be recovered from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from heretic_ds.runner.host_memory import trim
from heretic_ds.runner.memory import peak_memory

_SAFE_SHARE = 0.5
"""Part of the free memory that a batch may fill: other ranks, and other programs, take from the same."""


def rows_that_fit(run: Callable[[int], object], most: int, device: torch.device) -> int:
    """Rows, at most ``most``, whose working memory fits, by the peaks of two small batches.

    ``run(n)`` does a sample of the work on n rows. Without a way to measure memory, ``most``.
    """
    few, more = 1, min(4, most)
    run(few)  # the first call allocates what all later ones share
    if more == few:
        return most
    low, high = peak_of(lambda: run(few), device), peak_of(lambda: run(more), device)
    free = free_bytes(device)
    if low is None or high is None or free is None or high <= low:
        return most
    row = (high - low) / (more - few)
    return max(1, min(most, int(few + (_SAFE_SHARE * free - low) / row)))


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that were used at most while ``run`` ran, above what was used before; None where that cannot be told."""
    peak_memory()  # what was highest so far would be forgotten
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        trim()  # what was freed and kept would be taken without being seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except OSError:
        run()
        return None


def free_bytes(device: torch.device) -> int | None:
    """Memory that this rank may still use; host memory is shared with the other ranks of this machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        return _number("/proc/meminfo", "MemAvailable") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except OSError:
        return None


def _status(field: str) -> int:
    return _number("/proc/self/status", field)


def _number(file: str, field: str) -> int:
    """A field of a file of ``/proc``, which counts in kilobytes."""
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise OSError(f"{file} has no {field}")
