"""The backend ``autotp``: DeepSpeed-Inference's automatic tensor parallelism over a model without weights.

DeepSpeed replaces the layers; which part of each weight a rank holds is read off the replaced layers, and that part
alone is read from the files. What DeepSpeed gets wrong by default is put right here, each time with its reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from heretic_ds.checkpoint import Shard
from heretic_ds.checkpoint.fitness import first_line
from heretic_ds.placements.deepspeed import start_deepspeed
from heretic_ds.placements.tensor_parallel.sharding import CannotSplit
from heretic_ds.world import Replicas

log = logging.getLogger(__name__)


class _Group:
    """What DeepSpeed asks a model-parallel unit for: the ranks that share a replica, how many, which this one is."""

    def __init__(self, ranks: Replicas) -> None:
        self.get_model_parallel_group = lambda: ranks.inside
        self.get_model_parallel_world_size = lambda: ranks.degree
        self.get_model_parallel_rank = lambda: ranks.member


def lay_out(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], ranks: Replicas) -> dict[str, Shard]:
    """Let DeepSpeed replace the layers of an empty model, and say which parts of its parameters are this rank's.

    ``shapes`` are those of the whole parameters. Experts, and whatever else is a rank's part already, are left alone.
    Parameters of the model are uninitialised afterwards, on this rank's device. Raises CannotSplit where DeepSpeed
    cannot serve the model.
    """
    before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        _inject(model, ranks)
    except (AssertionError, ValueError, AttributeError, TypeError, KeyError, NotImplementedError) as error:
        # All that DeepSpeed is known to raise for models that it was not written for; others are faults, and are shown.
        raise CannotSplit(f"DeepSpeed's AutoTP cannot split {type(model).__name__} ({first_line(error)})") from error
    for module, held in buffers:  # DeepSpeed converted them to the weights' dtype, or gave them memory without numbers
        module._buffers.update(held)
    untouched = {name for name, shape in before.items() if shape != shapes[name]}
    return _shards(model, {name: shape for name, shape in shapes.items() if name not in untouched}, ranks)


def _inject(model: PreTrainedModel, ranks: Replicas) -> None:
    start_deepspeed()
    import deepspeed  # slow to import, and needed nowhere else
    from deepspeed.comm import comm
    from deepspeed.inference.engine import InferenceEngine

    if hasattr(comm.cdb, "shm_vector_kernel_level"):
        comm.cdb.shm_vector_kernel_level = 0  # the shared-memory sum ignores its group and adds up the whole world
    InferenceEngine.inference_mp_group = None  # kept by the class: a second engine would get the first one's group
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        deepspeed.init_inference(
            model,
            dtype=model.dtype,
            replace_with_kernel_inject=False,
            # The group alone crashes, the unit alone splits nothing; only both together split over this group.
            tensor_parallel={"tp_size": ranks.degree, "tp_group": ranks.inside, "mpu": _Group(ranks)},
        )
    log.debug("DeepSpeed: %s", said.getvalue().strip())


def _shards(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], ranks: Replicas) -> dict[str, Shard]:
    """The part of every parameter whose shape DeepSpeed changed."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    local = {name: tuple(parameters[name].shape) for name in shapes if name in parameters}
    everyone: list[Any] = [None] * ranks.degree
    dist.all_gather_object(everyone, local, group=ranks.inside)
    shards = {}
    for name in local:
        whole = shapes[name]
        dims = sorted({dim for each in everyone for dim, size in enumerate(each[name]) if size != whole[dim]})
        if not dims:
            continue
        sizes = [each[name][dims[0]] for each in everyone]
        if len(dims) != 1 or sum(sizes) != whole[dims[0]]:
            raise CannotSplit(
                f"DeepSpeed's AutoTP split {name} {list(whole)} into parts of {sizes}, which do not make it up"
            )
        layer = model.get_submodule(name.rpartition(".")[0])
        shards[name] = Shard(whole, dims[0], _ranges(name, layer, sizes, ranks.member))
    return shards


def _ranges(name: str, layer: nn.Module, sizes: list[int], member: int) -> tuple[tuple[int, int], ...]:
    """Which rows or columns a rank's part is made of: one run, or one of each part of a fused projection."""
    if not hasattr(layer, "_subparam_layout_spec"):
        start = sum(sizes[:member])
        return ((start, start + sizes[member]),)
    widths, parts = getattr(layer, "_subparam_shard_widths", None), getattr(layer, "_subparam_sizes", None)
    if widths is None or parts is None:
        raise CannotSplit(f"DeepSpeed's AutoTP splits {name} in a way that it does not describe")
    ranges, first = [], 0
    for part, width in zip(parts, widths, strict=True):
        start = first + sum(width[:member])
        ranges.append((start, start + width[member]))
        first += part
    return tuple(ranges)
