"""Fused experts of which each rank holds a part of the inner width: their forward ends in one sum over ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heretic_ds.anatomy import Anatomy

log = logging.getLogger(__name__)

_ALIGNMENT = 16
"""Bytes of which the rows of a grouped matrix product have to be a multiple."""
_UNALIGNED = frozenset({None, "eager", "batched_mm"})
"""Implementations that take rows of any size."""
_PREFIX = "split_over_ranks_"
_GROUP = "ranks_of_experts"
"""Attribute of a module of experts: the process group over which it is split."""


def sum_experts_over_ranks(model: PreTrainedModel, anatomy: Anatomy, group: dist.ProcessGroup) -> None:
    """Let every module of fused experts add up its outputs over `group`.

    Each expert's output is a sum over its inner width, of which a rank holds a part; weighting and adding experts is
    linear, so one sum per block does for all of them. The computation itself stays the one the model had chosen.
    """
    writers = [writer for writer in anatomy.writers if writer.experts is not None]
    modules: list[Any] = [model.get_submodule(writer.module) for writer in writers]
    for experts in modules:
        setattr(experts, _GROUP, group)
    chosen = {experts.config._experts_implementation for experts in modules}
    row_bytes = {w.weight_DK(model).shape[-1] * w.weight_DK(model).element_size() for w in writers}
    if any(size % _ALIGNMENT for size in row_bytes) and chosen - _UNALIGNED:
        log.info("experts of %s bytes a row are too narrow for a grouped product: they run one by one", row_bytes)
        chosen = {"eager"}
    for implementation in chosen:
        name = _PREFIX + str(implementation)
        ALL_EXPERTS_FUNCTIONS.register(name, _summed(implementation))
        model.set_experts_implementation(name)


def computation(module: nn.Module, implementation: str | None) -> Callable[..., Tensor]:
    """The function that computes a module of experts under the name of an implementation."""
    forward: Any = type(module).forward
    eager = forward.__wrapped__  # beneath the decorator that looks an implementation up
    chosen: Any = eager if implementation in (None, "None", "eager") else ALL_EXPERTS_FUNCTIONS[implementation]
    compute: Callable[..., Tensor] = chosen
    return compute


def unsummed(implementation: str) -> str:
    """The implementation whose outputs are those of this rank's part alone."""
    return implementation.removeprefix(_PREFIX)


def sum_over_ranks(module: nn.Module, partial: Tensor) -> Tensor:
    """Outputs of all ranks' parts of a module of experts, from this rank's, where it is split at all."""
    group = getattr(module, _GROUP, None)
    if group is not None:
        partial = partial.contiguous()
        dist.all_reduce(partial, group=group)
    return partial


def _summed(implementation: str | None) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        with torch.no_grad():
            return sum_over_ranks(
                self, computation(self, implementation)(self, hidden_states, top_k_index, top_k_weights)
            )

    return forward
