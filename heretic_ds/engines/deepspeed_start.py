"""Starting DeepSpeed's communication over the ranks that there are."""

from __future__ import annotations

import logging
import os
import warnings

import torch.distributed as dist


def start_deepspeed() -> None:
    """Let DeepSpeed use the processes' own group, or one of this process alone.

    On the CPU it would compile and use a sum through shared memory, which ignores the group it is asked to sum over; a
    process that is killed while it compiles leaves a lock behind, for which every later one waits for ever.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
