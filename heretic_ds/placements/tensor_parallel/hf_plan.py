"""The backend ``hf_plan``: transformers' own parallel plan of a family, carried out by our layers.

The plan is taken as data. transformers' implementation of it wraps parameters in distributed tensors, wants a mesh
over the whole world, and reads weights only through its own loader; plain tensors on this rank can be edited in place
and read from files by anyone.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from heretic_ds.checkpoint import Shard, split
from heretic_ds.placements.tensor_parallel.layers import SplitByInputs, SplitByOutputs
from heretic_ds.placements.tensor_parallel.sharding import Layout, linear_shards
from heretic_ds.world import Replicas


def lay_out(model: PreTrainedModel, layout: Layout, ranks: Replicas) -> dict[str, Shard]:
    """Replace the layers of an empty model by this rank's parts, and say which parts these are.

    ``model`` is on the meta device and stays there.
    """
    shards: dict[str, Shard] = {}
    for path, how in layout.linears.items():
        whole = cast(nn.Linear, model.get_submodule(path))
        shards |= linear_shards(path, whole, how, ranks.member, ranks.degree)
        part: nn.Linear
        if how.by_inputs:
            part = SplitByInputs(whole, ranks, how.whole_input)
        else:
            part = SplitByOutputs(whole, ranks, how.whole_output)
        model.set_submodule(path, part.requires_grad_(False).eval())
    for name in layout.parameters:
        shards[name] = split(model.get_parameter(name).shape, 0, ranks.member, ranks.degree)
    return shards
