"""Where partitioned weights rest between two uses, and whether that place can be used here."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import path_of
from heretic_ds.placements.deepspeed import load_op, quietly

if TYPE_CHECKING:
    from heretic_ds.placements.zero3 import Zero3

_LIBRARY = "install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL) on every node, or set another offload"
_SPARE_BUFFERS = 4
"""Buffers beyond those that one module needs, for what is read ahead."""


def check_offload(options: Zero3.Options, device: torch.device) -> None:
    """Refuse an offload that this machine cannot do. Touches this rank's machine only."""
    if options.offload == "cpu" and device.type == "cpu":
        raise UserError(
            "capture.offload=cpu keeps weights in host memory, where they lie anyway when the model runs on the CPU; "
            "set capture.offload=none, or nvme to keep them on a disk"
        )
    if options.offload == "nvme":
        _check_folder(options.nvme_path or "")
        _check_library()


def _check_folder(nvme_path: str) -> None:
    folder = path_of(nvme_path, "capture.nvme_path")
    if not folder.is_dir():
        raise UserError(f"capture.nvme_path={nvme_path} is no folder; expected one on a fast local disk")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"capture.nvme_path={nvme_path} cannot be written to ({error.strerror}); expected a writable folder"
        ) from error


def _check_library() -> None:
    with quietly():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        found = AsyncIOBuilder().is_compatible(verbose=False)
    if not found:
        raise UserError(f"capture.offload=nvme needs the asynchronous I/O library, which is missing here: {_LIBRARY}")


def load_reader(options: Zero3.Options) -> None:
    """Have DeepSpeed's reader for asynchronous I/O ready where it is needed: it is built against a system library at
    first use, which takes minutes. Raises UserError where it cannot be built."""
    if options.offload != "nvme":
        return
    with quietly():
        from deepspeed.ops.op_builder import AsyncIOBuilder
    try:
        load_op(AsyncIOBuilder())
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(
            f"capture.offload=nvme: DeepSpeed could not build its asynchronous I/O ({first_line(error)}): {_LIBRARY}"
        ) from error


def offload_section(options: Zero3.Options, skeleton: nn.Module, parts: int, ranks: int) -> dict[str, Any]:
    """DeepSpeed's ``offload_param`` for the partitions of ``skeleton`` over ``ranks``; nothing without an offload.

    ``parts`` is the largest number of parameters that are gathered at once.
    """
    if options.offload == "none":
        return {}
    fields: dict[str, Any] = {"device": options.offload, "pin_memory": options.pin_memory}
    if options.offload == "nvme":
        # A buffer has to hold the largest partition, and there have to be enough for what is gathered at once.
        largest = max(math.ceil(parameter.numel() / ranks) for parameter in skeleton.parameters())
        folder = str(path_of(options.nvme_path or "", "capture.nvme_path"))
        fields |= {"nvme_path": folder, "buffer_size": largest + 1, "buffer_count": parts + _SPARE_BUFFERS}
    return {"offload_param": fields}


def remove_swap_files(swapper: Any) -> None:
    """Free the pinned buffers of DeepSpeed's swapper and delete this rank's files."""
    swapper.synchronize_reads()
    swapper.synchronize_writes()
    swapper.aio_read_handle.free_cpu_locked_tensor(swapper.buffers)
    swapper.buffers = None
    shutil.rmtree(swapper.swap_folder, ignore_errors=True)
    for parent in list(Path(swapper.swap_folder).parents)[:2]:  # .../zero_stage_3/<dtype>params/rank<r>
        if parent.is_dir() and not os.listdir(parent):
            parent.rmdir()
