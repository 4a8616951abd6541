"""Edits of fused experts' outputs: applied where one expert has answered one token, by that expert's own row norms.

Transformers lets any function compute a module of experts, chosen by name. Ours lets the function chosen before compute
each (token, expert) slot by itself, unweighted; edits the slots; and then weights and adds them. Where ranks hold parts
of the experts, slots are partial sums: edits are linear, so one sum over ranks still comes last.

Shapes: N tokens, C experts a token, S = N·C slots, T trials, L blocks, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from heretic_ds.ablation import output_operator
from heretic_ds.edits.fused_experts import computation, sum_over_ranks, unsummed

if TYPE_CHECKING:
    from heretic_ds.edits.tables import Rows, TrialDirections, WriterTables

_PREFIX = "edited_by_slot_"
_EDIT = "edit_of_slots"
"""Attribute of a module of experts: the edits that its slots get now."""

_CHUNK_NUMBERS = 1 << 24
"""Numbers of the slots that are edited at one time: each needs several vectors of its own for the moment."""


class ExpertEdit:
    """The edits of one pass to the outputs of one module of experts."""

    def __init__(self, tables: WriterTables, directions: TrialDirections, bias_ED: Tensor | None, rows: Rows) -> None:
        self._norms_ED = tables.norms_D
        self._directions, self._bias_ED, self._rows = directions, bias_ED, rows

    def retake(self, directions: TrialDirections) -> None:
        """Become the edits of as many other trials, in the memory of these."""
        self._directions.copy_(directions)

    def __call__(self, output_SD: Tensor, expert_S: Tensor) -> Tensor:
        """Edited outputs [S, D], at least float32, slots of one token side by side."""
        trial_S = self._rows.tokens(len(expert_S))
        trial_S = torch.zeros_like(expert_S) if trial_S is None else trial_S
        chunk = max(1, _CHUNK_NUMBERS // output_SD.shape[-1])
        parts = zip(output_SD.split(chunk), expert_S.split(chunk), trial_S.split(chunk), strict=True)
        return torch.cat([self._edited(*part) for part in parts])

    def _edited(self, output_SD: Tensor, expert_S: Tensor, trial_S: Tensor) -> Tensor:
        trials, norms_SD = self._directions, self._norms_ED[expert_S]
        overlaps_SD = None
        if trials.overlaps_QD is not None:
            share_S2 = trials.share_T2[trial_S]
            below_SD = trials.overlaps_QD[expert_S, trials.below_T[trial_S]]
            above_SD = trials.overlaps_QD[expert_S, trials.above_T[trial_S]]
            overlaps_SD = share_S2[:, :1] * below_SD + share_S2[:, 1:] * above_SD
        operator = output_operator(norms_SD, overlaps_SD, trials.unit_TD[trial_S], trials.strength_T1[trial_S])
        value_SD = output_SD.to(norms_SD.dtype)
        if self._bias_ED is None:
            return operator(value_SD)
        bias_SD = self._bias_ED[expert_S]
        return operator(value_SD - bias_SD) + bias_SD


def dispatch_edits(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Let the modules of experts at ``paths`` ask for edits of their slots whenever they run.

    Without edits they compute what they did before, by the implementation chosen before.
    """
    experts: list[Any] = [model.get_submodule(path) for path in paths]
    for chosen in {str(each.config._experts_implementation) for each in experts}:
        if not chosen.startswith(_PREFIX):
            ALL_EXPERTS_FUNCTIONS.register(_PREFIX + chosen, _edited_by_slot(chosen))
            model.set_experts_implementation(_PREFIX + chosen)


def base_implementation(experts: Any) -> str:
    """The implementation by which a module of experts computes, whatever else happens around it."""
    return unsummed(str(experts.config._experts_implementation).removeprefix(_PREFIX))


@contextmanager
def edit_experts(experts: nn.Module, edit: ExpertEdit) -> Iterator[None]:
    """Edit a module's slots while the context lasts."""
    setattr(experts, _EDIT, edit)
    try:
        yield
    finally:
        delattr(experts, _EDIT)


def _edited_by_slot(implementation: str) -> Any:
    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        edit: ExpertEdit | None = getattr(self, _EDIT, None)
        if edit is None:
            whole: Tensor = computation(self, implementation)(self, hidden_states, top_k_index, top_k_weights)
            return whole
        (n_tokens, width), per_token = hidden_states.shape, top_k_index.shape[-1]
        expert_S = top_k_index.reshape(-1)
        slots_SD = computation(self, unsummed(implementation))(
            self,
            hidden_states.repeat_interleave(per_token, dim=0),
            expert_S[:, None],
            torch.ones_like(top_k_weights).reshape(-1, 1),
        )
        edited_SD = edit(slots_SD, expert_S)
        weights_NC1 = top_k_weights.to(edited_SD.dtype)[..., None]
        output_ND = (edited_SD.view(n_tokens, per_token, width) * weights_NC1).sum(dim=1).to(hidden_states.dtype)
        return sum_over_ranks(self, output_ND)

    return forward
