"""What the C library does with host memory that is freed, where it is glibc; elsewhere nothing can be told it.

One setting holds for the whole process: an engine that changes it brings it back when it is closed.
"""

from __future__ import annotations

import ctypes
import sys

from heretic_ds.runner.memory import release_memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``: free bytes at the end of the heap from which on they are returned; bytes from which on a block has a
mapping of its own, which is returned as soon as it is freed."""
_SOME_MEGABYTES = 2**22
_USUAL_BLOCK, _USUAL_END = 2**25, 2**26
"""What glibc comes to by itself in a process that frees large blocks, and the most that all its versions take."""
_KEPT_END = 2**28


def give_back_memory() -> None:
    """Collect garbage, and return freed memory to the device and to the operating system.

    The C library keeps freed memory for later allocations of this process; another engine would come on top of it.
    """
    release_memory()
    trim()


def trim() -> None:
    """Return freed memory to the operating system."""
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


def _call(name: str, *arguments: int) -> int:
    """Call a function that glibc alone has; 0 where it is not there."""
    if sys.platform != "linux":
        return 0
    function = getattr(ctypes.CDLL(None), name, None)
    return 0 if function is None else int(function(*arguments))
