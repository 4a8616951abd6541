"""Importing DeepSpeed without its chatter, and starting its communication over the ranks that there are."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from heretic_ds.errors import UserError


@contextmanager
def quietly() -> Iterator[None]:
    """Without messages below warnings: DeepSpeed tries the compiler and logs every command to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def check_accelerator(device: torch.device) -> None:
    """Raise UserError where DeepSpeed, which settles at its import on one kind of device, took another than this."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with quietly():
        from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise UserError(
            f"model.device={device.type}, but DeepSpeed runs on {get_accelerator().device_name()} here; "
            f"set DS_ACCELERATOR={device.type} in the environment, or model.device=auto"
        )


def start_deepspeed() -> None:
    """Let DeepSpeed use the processes' own group, or one of this process alone.

    On the CPU it would compile and use a sum through shared memory, which ignores the group it is asked to sum over; a
    process that is killed while it compiles leaves a lock behind, for which every later one waits for ever.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    with quietly():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # looks for all that could be compiled
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
