"""Partitioning a model for ZeRO-3 as it is read: every rank reads its own part of every parameter, and no more.

ZeRO-3 cuts each parameter, as one row of numbers, into as many equal parts as there are ranks.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from torch import Tensor, nn

from heretic_ds.checkpoint import Checkpoint, Shard
from heretic_ds.checkpoint.fitness import dtype_name
from heretic_ds.errors import UserError


@torch.no_grad()
def load_partitions(model: nn.Module, checkpoint: Checkpoint, init: Any, rank: int, ranks: int) -> None:
    """Replace the meta parameters of ``model`` by partitioned ones with the checkpoint's numbers, and fill its buffers.

    ``init`` is DeepSpeed's ``zero.Init`` for this layout. Tied parameters stay one. Raises UserError for numbers that
    are not finite.
    """
    made: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        path, _, attribute = name.rpartition(".")
        if id(old) not in made:
            whole = _own_part(name, checkpoint, rank, ranks)
            made[id(old)] = _partitioned(nn.Parameter(whole, requires_grad=False), init)
        model.get_submodule(path)._parameters[attribute] = made[id(old)]
    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            name = f"{path}.{attribute}" if path else attribute
            if buffer is not None and name in checkpoint.shapes:
                module._buffers[attribute] = checkpoint.read(name, checkpoint.whole(name), init.local_device)
            elif buffer is not None:
                module._buffers[attribute] = buffer.to(init.local_device)


def _own_part(name: str, checkpoint: Checkpoint, rank: int, ranks: int) -> Tensor:
    """A host tensor of the parameter's whole shape in which only this rank's part has been written.

    The part is filled by whole rows, so up to two rows more are read.
    """
    shape = checkpoint.shapes[name]
    whole = _untouched(shape, checkpoint.dtypes[name])
    part = -(-whole.numel() // ranks)
    start, stop = rank * part, min((rank + 1) * part, whole.numel())
    if not shape:
        checkpoint.read_into(name, checkpoint.whole(name), whole)
    elif start < stop:
        row = whole.numel() // shape[0]
        first, last = start // row, -(-stop // row)
        checkpoint.read_into(name, Shard(shape, 0, ((first, last),)), whole[first:last])
    return whole


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A host tensor in a mapping of its own, which takes room only where it is written to, and none once it is gone."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def _partitioned(parameter: nn.Parameter, init: Any) -> nn.Parameter:
    """The parameter as DeepSpeed's, cut at once: no rank sends what each reads for itself."""
    swapper, part = init.param_swapper, -(-parameter.numel() // init.dp_world_size)
    if swapper is not None and parameter.dtype != swapper.dtype and swapper.swappable_tensor(numel=part):
        raise UserError(
            f"capture.offload=nvme: large weights stay in {dtype_name(parameter.dtype)} beside others in "
            f"{dtype_name(swapper.dtype)}, but DeepSpeed's files hold one kind; set model.dtype=float32"
        )
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=init.local_device)
    return parameter
