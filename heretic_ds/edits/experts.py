"""Modules of fused experts: their outputs edited one slot at a time, and summed over the ranks that hold parts of them.

Transformers lets any function compute a module of experts, chosen by name. Ours lets the function chosen before compute
each (token, expert) slot by itself, unweighted; edits the slots, by their own experts' row norms; and then weights and
adds them. Where ranks hold parts of the experts' inner width, outputs are partial sums: edits, weights and sums are
linear, so one sum over ranks comes last for everything. Without edits the function chosen before computes all at once.

Shapes: N tokens, C experts a token, S = N·C slots, T trials, D width, E experts, R directions of an edit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heretic_ds.ablation import Edit, reciprocal
from heretic_ds.anatomy import Anatomy
from heretic_ds.edits.tables import WriterTables, in_memory_of

log = logging.getLogger(__name__)

_PREFIX = "edited_and_summed_"
_EDIT, _GROUP = "edit_of_slots", "ranks_of_experts"
"""Attributes of a module of experts: what its slots get now, and the process group over which it is split."""
_ALIGNMENT = 16
"""Bytes of which the rows of a grouped matrix product have to be a multiple."""
_UNALIGNED = frozenset({"None", "eager", "batched_mm"})
"""Implementations that take rows of any size."""
_CHUNK_NUMBERS = 1 << 24
"""Numbers of the slots that are edited at one time: each needs several vectors of its own for the moment."""

EditSlots = Callable[[Tensor, Tensor], Tensor]
"""Edited outputs [S, D] of slots from their outputs and experts [S], slots of one token side by side."""


class ExpertEdit:
    """The edits of one pass to the outputs of one module of experts.

    One direction is looked up slot by slot. Of several the products with all trials' directions are computed at once,
    and those with other trials' than a slot's own left out; s, which is each trial's and expert's own, is kept for the
    pass. So R hardly counts (``benchmarks/rank_k.py``).
    """

    def __init__(self, tables: WriterTables, bias_ED: Tensor | None, edits: Sequence[Edit | None]) -> None:
        self._tables, self._bias_ED = tables, bias_ED
        self._trials = tables.directions(edits)
        self._scales_ETD = self._scales()

    def set(self, edits: Sequence[Edit | None]) -> None:
        """Become other edits, in the memory of those before where these are as many."""
        self._trials = self._trials.replaced(self._tables.directions(edits))
        scales_ETD = self._scales()
        if self._scales_ETD is not None and scales_ETD is not None:
            self._scales_ETD = in_memory_of(self._scales_ETD, scales_ETD)

    def _scales(self) -> Tensor | None:
        return None if self._tables.rank == 1 else self._trials.scales(self._tables.norms_D)

    def __call__(self, output_SD: Tensor, expert_S: Tensor, trial_S: Tensor) -> Tensor:
        """Edited outputs [S, D] of some experts for rows of some trials, at least float32."""
        chunk = max(1, _CHUNK_NUMBERS // output_SD.shape[-1])
        parts = zip(output_SD.split(chunk), expert_S.split(chunk), trial_S.split(chunk), strict=True)
        return torch.cat([self._edited(*part) for part in parts])

    def _edited(self, output_SD: Tensor, expert_S: Tensor, trial_S: Tensor) -> Tensor:
        norms_SD = self._tables.norms_D[expert_S]
        value_SD = output_SD.to(norms_SD.dtype)
        if self._tables.rank == 1:
            operator: Callable[[Tensor], Tensor] = self._trials.operator(norms_SD, trial_S, expert_S)
        else:
            operator = partial(self._along_several, norms_SD, expert_S, trial_S)
        if self._bias_ED is None:
            return operator(value_SD)
        bias_SD = self._bias_ED[expert_S]
        return operator(value_SD - bias_SD) + bias_SD

    def _along_several(self, norms_SD: Tensor, expert_S: Tensor, trial_S: Tensor, value_SD: Tensor) -> Tensor:
        trials, directions_QD = self._trials, self._trials.unit_TRD.flatten(0, 1)
        trial_T = torch.arange(len(trials.unit_TRD), device=trial_S.device)
        strength_ST = (trial_S[:, None] == trial_T) * trials.strength_T11[:, 0, 0]
        found_SQ = (value_SD * reciprocal(norms_SD)) @ directions_QD.T
        removed_SQ = (found_SQ.unflatten(1, (len(trial_T), -1)) * strength_ST[..., None]).flatten(1)
        value_SD = torch.addcmul(value_SD, norms_SD, removed_SQ @ directions_QD, value=-1)
        return value_SD if self._scales_ETD is None else value_SD * self._scales_ETD[expert_S, trial_S]


def edit_experts(model: PreTrainedModel, path: str, edit: EditSlots) -> Callable[[], None]:
    """Edit the slots of the module of experts at a path; what is returned ends that."""
    experts = model.get_submodule(path)
    _dispatch(model, [experts])
    setattr(experts, _EDIT, edit)
    return lambda: delattr(experts, _EDIT)


def sum_experts_over_ranks(model: PreTrainedModel, anatomy: Anatomy, group: dist.ProcessGroup | None) -> None:
    """Let every module of fused experts, of whose inner width each rank of ``group`` holds a part, add up its outputs.

    The computation itself stays the one that the model had chosen.
    """
    writers = [writer for writer in anatomy.writers if writer.experts is not None]
    modules: list[Any] = [model.get_submodule(writer.module) for writer in writers]
    for experts in modules:
        setattr(experts, _GROUP, group)
    chosen = {str(experts.config._experts_implementation) for experts in modules}
    row_bytes = {w.weight_DK(model).shape[-1] * w.weight_DK(model).element_size() for w in writers}
    narrow = bool(chosen - _UNALIGNED) and any(size % _ALIGNMENT for size in row_bytes)
    if narrow:
        log.info("experts of %s bytes a row are too narrow for a grouped product: they run one by one", row_bytes)
    _dispatch(model, modules, "eager" if narrow else None)


def base_implementation(experts: Any) -> str:
    """The implementation by which a module of experts computes, whatever else happens around it."""
    return str(experts.config._experts_implementation).removeprefix(_PREFIX)


def _dispatch(model: PreTrainedModel, modules: Sequence[Any], implementation: str | None = None) -> None:
    """Let modules of experts compute by our function around an implementation, by default the one chosen before."""
    for chosen in {str(experts.config._experts_implementation) for experts in modules}:
        if not chosen.startswith(_PREFIX):
            base = implementation or chosen
            ALL_EXPERTS_FUNCTIONS.register(_PREFIX + base, _around(base))
            model.set_experts_implementation(_PREFIX + base)


def _around(implementation: str) -> Callable[..., Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        forward_of_class: Any = type(self).forward
        eager = forward_of_class.__wrapped__  # beneath the decorator that looks an implementation up
        compute: Any = eager if implementation in ("None", "eager") else ALL_EXPERTS_FUNCTIONS[implementation]
        edit: EditSlots | None = getattr(self, _EDIT, None)
        group: dist.ProcessGroup | None = getattr(self, _GROUP, None)
        if edit is None:
            output_ND: Tensor = compute(self, hidden_states, top_k_index, top_k_weights)
        else:
            hidden_SD = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
            expert_S1, unweighted_S1 = top_k_index.reshape(-1, 1), torch.ones_like(top_k_weights).reshape(-1, 1)
            edited_SD = edit(compute(self, hidden_SD, expert_S1, unweighted_S1), expert_S1[:, 0])
            weighted_NCD = edited_SD.view(*top_k_index.shape, -1) * top_k_weights.to(edited_SD.dtype)[..., None]
            output_ND = weighted_NCD.sum(dim=1).to(hidden_states.dtype)
        if group is not None:
            output_ND = output_ND.detach().contiguous()
            dist.all_reduce(output_ND, group=group)
        return output_ND

    return forward
