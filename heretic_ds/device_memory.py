"""How to tell that memory ran out, and how to give back what was freed."""

from __future__ import annotations

import gc
import logging

import torch

log = logging.getLogger(__name__)
_captures = {"failed": False}


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
