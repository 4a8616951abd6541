"""Importing DeepSpeed without its chatter, and starting its communication over the ranks that there are."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def quietly() -> Iterator[None]:
    """Without messages below warnings: DeepSpeed tries the compiler and logs every command to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def start_deepspeed() -> None:
    """Let DeepSpeed use the processes' own group, or one of this process alone.

    On the CPU it would compile and use a sum through shared memory, which ignores the group it is asked to sum over; a
    process that is killed while it compiles leaves a lock behind, for which every later one waits for ever.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    with quietly():
        import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
