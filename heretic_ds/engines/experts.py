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
    modules: list[Any] = [model.get_submodule(w.module) for w in anatomy.writers if w.experts is not None]
    for experts in modules:
        setattr(experts, _GROUP, group)
    for implementation in {experts.config._experts_implementation for experts in modules}:
        name = _PREFIX + str(implementation)
        ALL_EXPERTS_FUNCTIONS.register(name, _summed(implementation))
        model.set_experts_implementation(name)


def computation(module: nn.Module, implementation: str | None) -> Callable[..., Tensor]:
    """The function that computes a module of experts under the name of an implementation."""
    eager: Any = type(module).forward.__wrapped__  # type: ignore[attr-defined]
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
