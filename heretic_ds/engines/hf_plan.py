"""The backend ``hf_plan``: transformers' own parallel plan of a family, carried out by our layers.

The plan is taken as data. transformers' implementation of it wraps parameters in distributed tensors, wants a mesh
over the whole world, and reads weights only through its own loader; plain tensors on this rank can be edited in place
and read from files by anyone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.engines.parallel_layers import SplitByInputs, SplitByOutputs, split_vocabulary
from heretic_ds.engines.sharding import Layout, linear_shards
from heretic_ds.sharded_loading import Shard, split


def lay_out(
    model: PreTrainedModel, anatomy: Anatomy, layout: Layout, group: dist.ProcessGroup, member: int, degree: int
) -> dict[str, Shard]:
    """Replace the layers of an empty model by this rank's parts, and say which parts these are.

    ``model`` is on the meta device and stays there; experts are no part of this.
    """
    shards: dict[str, Shard] = {}
    for path, how in layout.linears.items():
        whole = model.get_submodule(path)
        shards |= linear_shards(path, whole, how, member, degree)
        part: nn.Linear
        if how.by_inputs:
            part = SplitByInputs(whole, group, member, degree, how.whole_input)
        else:
            part = SplitByOutputs(whole, group, member, degree, how.whole_output)
        model.set_submodule(path, part.requires_grad_(False).eval())
    for path in layout.vocabularies:
        embedding = model.get_submodule(path)
        shard = split(embedding.weight.shape, 0, member, degree)
        start, stop = (shard.ranges or ((0, 0),))[0]
        split_vocabulary(embedding, group, start, stop)
        shards[f"{path}.weight"] = shard
    for name in layout.parameters:
        shards[name] = split(model.get_parameter(name).shape, 0, member, degree)
    for name, shard in shards.items():
        _resize(model, name, shard)
    return shards


def _resize(model: nn.Module, name: str, shard: Shard) -> None:
    """Give a parameter on the meta device the shape of this rank's part."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    dtype = module._parameters[attribute].dtype
    empty = torch.empty(shard.local_shape, dtype=dtype, device="meta")
    module._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
