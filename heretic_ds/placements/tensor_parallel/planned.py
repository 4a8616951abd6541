"""What a rank of a replica would hold, from a model on the meta device alone: no ranks, and no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Shard, split
from heretic_ds.placements.costs import Exchange, Facts
from heretic_ds.placements.tensor_parallel import sharding

_LEFT_WHOLE = ("mlp.gate", "block_sparse_moe.gate", "q_a_proj", "kv_a_proj_with_mqa", "shared_expert_gate")
"""Ends of the paths of layers that DeepSpeed's AutoTP leaves alone."""


def automatic(model: nn.Module, anatomy: Anatomy) -> sharding.Layout:
    """What DeepSpeed's AutoTP does to the families that it is known to serve: linear layers of blocks are split, those
    that write to the stream by their inputs and all others by their outputs."""
    writers = {writer.module for writer in anatomy.writers if writer.experts is None}
    linears = {
        path: sharding.STYLES["rowwise" if path in writers else "colwise"]
        for path, module in model.named_modules()
        if path.startswith(f"{anatomy.blocks}.") and isinstance(module, nn.Linear) and not path.endswith(_LEFT_WHOLE)
    }
    return sharding.Layout(linears, frozenset())


def shards_of(model: PreTrainedModel, anatomy: Anatomy, layout: sharding.Layout, degree: int) -> dict[str, Shard]:
    """The parts of the first rank, which are the largest, by parameter name. Raises CannotSplit."""
    shards = sharding.expert_shards(model, anatomy, 0, degree)
    for path, how in layout.linears.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        shards |= sharding.linear_shards(path, linear, how, 0, degree)
    tables = [model.get_submodule(anatomy.embedding), model.get_output_embeddings()]
    for path, module in model.named_modules():
        if any(module is table for table in tables):
            shards |= {
                f"{path}.{name}": split(each.shape, 0, 0, degree)
                for name, each in module.named_parameters(recurse=False)
            }
    for name in layout.parameters:
        shards[name] = split(model.get_parameter(name).shape, 0, 0, degree)
    return shards


def sizes_held(facts: Facts, backend: str, degree: int, setting: str) -> Mapping[str, int]:
    """Bytes of each parameter on the fullest of ``degree`` ranks; tied ones once. Raises CannotSplit."""
    model, anatomy, kind = facts.model, facts.anatomy, facts.model.config.model_type

    def plan() -> sharding.Layout:
        if sharding.choose_backend(model, kind, backend) == "hf_plan":
            return sharding.read_plan(model, anatomy, sharding.plan_of(model, kind))
        return automatic(model, anatomy)

    def sizes() -> Mapping[str, int]:
        shards = shards_of(model, anatomy, layout, degree)
        return {
            name: math.prod(shards[name].local_shape if name in shards else each.shape) * each.element_size()
            for name, each in model.named_parameters()
        }

    layout = facts.once(("parallel plan", backend), plan)
    if sharding.splits_heads(anatomy, layout):
        sharding.check_heads(kind, facts.config, degree, setting)
    return facts.once(("sizes held", backend, degree), sizes)


def exchange_of(facts: Facts, degree: int, stages: int = 1) -> Exchange:
    """What the ranks of a replica, or of one of its stages, send one another in a pass: two sums a block, one for the
    embedding, and the parts of logits."""
    sums = 2 * facts.anatomy.n_blocks / stages + 1
    each, apart = facts.dtype.itemsize, (degree - 1) / degree
    of_token, of_row = 2 * apart * facts.anatomy.width * each, apart * facts.vocabulary * each
    return Exchange(degree, token_bytes=sums * of_token, row_bytes=of_row / stages, messages=sums + 1)
