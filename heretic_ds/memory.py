"""Memory: whether it ran out, what was used, what is free, and giving it back, on the device and on the host.

One setting of the C library holds for the whole process: an engine that changes it brings it back when it is closed.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``: free bytes at the end of the heap from which on they are returned; bytes from which on a block has a
mapping of its own, which is returned as soon as it is freed."""
_SOME_MEGABYTES = 2**22
_USUAL_BLOCK, _USUAL_END = 2**25, 2**26
"""What glibc comes to by itself in a process that frees large blocks, and the most that all its versions take."""
_KEPT_END = 2**28

_captures = {"failed": False}
_highest = {"host": 0, "device": 0}  # the system's own peaks start anew where one piece of work is measured


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error) and "llocat" in str(error)


def release_memory() -> None:
    """Give cached memory back to the device."""
    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        if not _captures["failed"]:
            raise
        # Some versions of PyTorch's allocator then assert that no capture goes on. What is cached is still used again.
        log.debug("cached memory stays with this process: a CUDA graph could not be captured")


def note_failed_capture() -> None:
    """Remember that the capture of a CUDA graph has failed, which the allocator may take for one that goes on."""
    _captures["failed"] = True


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given: what is timed without that is how long giving it took."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


def peak_memory() -> dict[str, int]:
    """Peak bytes used so far by this process on the host, and on its device (0 without one)."""
    host = _host_peak()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    _highest["host"], _highest["device"] = max(_highest["host"], host), max(_highest["device"], device)
    return dict(_highest)


def resident_memory() -> int:
    """Bytes of the host's memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that were used at most while ``run`` ran, above what was used before; None where that cannot be told."""
    peak_memory()  # what was highest so far would be forgotten
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _call("malloc_trim", 0)  # what was freed and kept would be taken without being seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident_memory()
        run()
        return _peak_since_reset() - before
    except OSError:
        run()
        return None


def free_bytes(device: torch.device) -> int:
    """Memory that this rank may still use; host memory is shared with the other ranks of this machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return free_on_host() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_on_host() -> int:
    """Bytes of memory of this machine that nobody uses, or of what a container or a batch system grants of it."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())]))


def host_memory() -> int:
    """Bytes of memory that this machine has, or that a container or a batch system grants of it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def _limits(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """Limits of Linux control groups on this process, each with the bytes in use that cannot be dropped at once.

    A group's limit holds for all groups in it, so those above the process's own count too. Empty elsewhere.
    """
    try:
        paths = [line.split(":", 2)[1:] for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    found = []
    for controllers, path in paths:
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups  # version 1 has a tree for each controller
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        here = root / path.lstrip("/")
        # In a container the path may be the host's, where only the root is to be seen.
        for folder in [folder for folder in (here, *here.parents) if folder == root or root in folder.parents]:
            limit, used = (_bytes_in(folder / name) for name in names)
            if limit is not None and used is not None:
                found.append((limit, used - _droppable(folder / "memory.stat")))
    return found


def _bytes_in(file: Path) -> int | None:
    """The number in a control group's file; None where there is none, or no limit."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _droppable(stat: Path) -> int:
    """Bytes of files that were read and that the system forgets as soon as memory is asked for."""
    try:
        rows = dict(line.split(" ", 1) for line in stat.read_text(encoding="utf-8").splitlines())
    except OSError:
        return 0
    return int(rows.get("total_inactive_file") or rows.get("inactive_file") or 0)


def give_back_memory() -> None:
    """Collect garbage, and return freed memory to the device and to the operating system.

    The C library keeps freed memory for later allocations of this process; another engine would come on top of it.
    """
    release_memory()
    _call("malloc_trim", 0)


def return_freed_blocks(at_once: bool) -> None:
    """Whether the C library returns blocks of some megabytes as soon as they are freed, or does what it usually does.

    Weights that are gathered for a moment come and go in such blocks, between others that stay: kept, their holes add
    up to more than the weights themselves.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, _SOME_MEGABYTES if at_once else _USUAL_BLOCK)
    _call("mallopt", _M_TRIM_THRESHOLD, _USUAL_END)


def keep_freed_blocks() -> None:
    """Let the C library keep some hundred freed megabytes for what comes next, until :func:`return_freed_blocks`.

    Passes come and go in blocks of megabytes; returned each time, every page of the next one is a fault: a tenth of a
    small model's trial on a CPU.
    """
    if _call("mallopt", _M_MMAP_THRESHOLD, _USUAL_BLOCK):
        _call("mallopt", _M_TRIM_THRESHOLD, _KEPT_END)


def _peak_since_reset() -> int:
    """The most bytes since the system was told to count anew. What :mod:`resource` tells is no less than what the
    process that started this one used, which nothing resets."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _host_peak() -> int:
    """The most bytes of this process so far; where the system does not keep count, those of now."""
    try:
        import resource
    except ImportError:
        return resident_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _call(name: str, *arguments: int) -> int:
    """Call a function that glibc alone has; 0 where it is not there."""
    if sys.platform != "linux":
        return 0
    function = getattr(ctypes.CDLL(None), name, None)
    return 0 if function is None else int(function(*arguments))
