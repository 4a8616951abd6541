"""Fused experts of which each rank holds a part of the inner width: their forward ends in one sum over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heretic_ds.anatomy import Anatomy

_PREFIX = "split_over_ranks_"
_GROUP = "ranks_of_experts"
"""Attribute of a module of experts: the process group over which it is split."""


def sum_experts_over_ranks(model: PreTrainedModel, anatomy: Anatomy, group: dist.ProcessGroup) -> None:
    """Let every module of fused experts add up its outputs over `group`.

    Each expert's output is a sum over its inner width, of which a rank holds a part; weighting and adding experts is
    linear, so one sum per block does for all of them. The computation itself stays the one the model had chosen.
    """
    modules = {writer.module for writer in anatomy.writers if writer.experts is not None}
    for path in modules:
        setattr(model.get_submodule(path), _GROUP, group)
    chosen = {model.get_submodule(path).config._experts_implementation for path in modules}
    for implementation in chosen:
        name = _PREFIX + str(implementation)
        ALL_EXPERTS_FUNCTIONS.register(name, _summed(implementation))
        model.set_experts_implementation(name)


def _summed(implementation: str | None) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        eager: Any = type(self).forward.__wrapped__  # type: ignore[attr-defined]
        compute = eager if implementation in (None, "eager") else ALL_EXPERTS_FUNCTIONS[implementation]
        with torch.no_grad():
            partial: Tensor = compute(self, hidden_states, top_k_index, top_k_weights).contiguous()
            dist.all_reduce(partial, group=getattr(self, _GROUP))
        return partial

    return forward
