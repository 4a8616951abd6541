"""Putting DeepSpeed's kernels in the place of a model's blocks, and finding the writers again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.errors import UserError
from heretic_ds.placements.deepspeed import start_deepspeed
from heretic_ds.placements.kernel_inject.adapter import Adapter, InjectedBlock, ResidualSum
from heretic_ds.placements.kernel_inject.families import Family
from heretic_ds.placements.kernel_inject.workspace import Shape, Workspace

log = logging.getLogger(__name__)

_WRITERS = {"attention": "injected.attention.attn_ow", "mlp": "injected.mlp.output_w"}
"""The writing weight of each component within an injected block; they lie with the input first."""


@dataclasses.dataclass
class Injected:
    """A model whose blocks are DeepSpeed's."""

    anatomy: Anatomy
    """The writers as they lie in the injected blocks."""
    adapter: Adapter
    close: Callable[[], None]
    """Give back the workspace and what DeepSpeed keeps in its classes."""


def inject(model: PreTrainedModel, anatomy: Anatomy, family: Family, dtype: torch.dtype) -> Injected:
    """Replace every block of ``model``, in place; the weights of the blocks that were there are lost.

    Raises UserError where some block was not replaced.
    """
    start_deepspeed()
    import deepspeed
    from deepspeed.utils import logger

    from heretic_ds.placements.kernel_inject.policies import POLICIES, forget, only

    logger.setLevel(logging.WARNING)
    with torch.no_grad(), only(POLICIES[family.policy]):
        engine = deepspeed.init_inference(model, dtype=dtype, replace_with_kernel_inject=True)
    del engine  # the model itself was changed; the engine around it only patches `generate`
    blocks = model.get_submodule(anatomy.blocks)
    _refuse_incomplete(blocks, anatomy)
    shape = Shape.of(model.config, anatomy.n_blocks, dtype, family.gated)
    adapter = Adapter(Workspace(shape, model.device))
    for name, block in list(blocks.named_children()):
        if family.gated:
            block.mlp.residual_add_func = ResidualSum()  # type: ignore[union-attr]
        setattr(blocks, name, InjectedBlock(block, adapter, family.returns_pair))
    adapter.attach(model.get_submodule(anatomy.decoder), list(blocks.children()))  # type: ignore[arg-type]
    writers = tuple(_injected_writer(writer, anatomy) for writer in anatomy.writers)
    return Injected(dataclasses.replace(anatomy, writers=writers), adapter, forget)


def _refuse_incomplete(blocks: nn.Module, anatomy: Anatomy) -> None:
    from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference

    children = list(blocks.children())
    kinds = [type(block).__name__ for block in children if not isinstance(block, DeepSpeedTransformerInference)]
    if kinds or len(children) != anatomy.n_blocks:
        raise UserError(
            f"evaluate=kernel_inject replaced {anatomy.n_blocks - len(kinds)} of {anatomy.n_blocks} blocks "
            f"({', '.join(sorted(set(kinds)))} stayed); set evaluate=tensor_parallel"
        )


def _injected_writer(writer: Writer, anatomy: Anatomy) -> Writer:
    """The same writer where the kernels read it: the input comes first there."""
    weight = f"{anatomy.blocks}.{writer.block}.{_WRITERS[writer.component]}"
    return dataclasses.replace(writer, module=weight.rpartition(".")[0], weight=weight, bias=None, layout="KD")
