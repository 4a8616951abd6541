"""Edits of outputs where experts lie on several ranks: the number of its trial travels with every token.

The layers of experts send tokens to the ranks that hold their experts, and answers back. An expert's edit needs its own
row norms, which only its own rank knows: so answers are edited there, before they return.

Shapes: N tokens, C experts a token, S rows that this rank's experts answer, E experts on this rank.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.edits.experts import ExpertEdit
from heretic_ds.edits.outputs import DenseEdit, OutputEdits
from heretic_ds.edits.tables import Rows


class TravellingRows:
    """Which trial each row belongs to that this rank's experts of one layer answer."""

    def __init__(self, layer: Any, rows: Rows) -> None:
        """``layer`` is AutoEP's; ``rows`` says which trial this rank's own tokens belong to."""
        self._layer, self._own = layer, rows
        self._trial_S: Tensor | None = None

    def travel(self, router: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the layer's router: send each token's trial where the layer will send the token."""
        from deepspeed.module_inject.auto_ep_layer import compute_split_plan, permute_by_local_expert

        _, expert_NC, counts = output
        layer, per_token = self._layer, expert_NC.shape[1]
        order = torch.argsort(expert_NC.reshape(-1), stable=True)
        trial_S = self._own.tokens(len(expert_NC))[order // per_token]
        if layer.ep_size > 1:
            plan = compute_split_plan(
                expert_NC, layer.num_experts, layer.ep_size, layer.num_local_experts, layer.ep_group, counts
            )
            arriving_S = trial_S.new_empty(sum(plan.output_splits))
            dist.all_to_all_single(arriving_S, trial_S, plan.output_splits, plan.input_splits, group=layer.ep_group)
            trial_S, counts = arriving_S, plan.local_counts_by_source
        sorted_S1, *_ = permute_by_local_expert(trial_S[:, None].float(), counts)
        self._trial_S = sorted_S1[:, 0].long()

    def tokens(self, count: int) -> Tensor:
        """The trial of each of the ``count`` rows of the layer's experts."""
        if self._trial_S is None or len(self._trial_S) != count:
            raise RuntimeError(f"the trials of {count} rows of experts have not arrived")
        return self._trial_S


class ExpertParallelEdits(OutputEdits):
    """Edits of one model's outputs, those of this rank's experts for the tokens of all ranks, which have to take the
    same edits."""

    @classmethod
    def obstacle(cls, model: nn.Module, anatomy: Anatomy) -> str | None:
        """None: every layer of experts is AutoEP's, which tells where a token goes."""
        return None

    def _edits_experts(self, writer: Writer) -> bool:
        return writer.experts is not None

    def _attach(self, writer: Writer, edit: DenseEdit | ExpertEdit, stack: ExitStack) -> None:
        if isinstance(edit, DenseEdit):
            super()._attach(writer, edit, stack)
            return
        layer: Any = self._model.get_submodule(writer.module.rpartition(".")[0])
        rows = TravellingRows(layer, self._rows)

        def edited(experts: nn.Module, args: tuple[Tensor, Tensor], output_SD: Tensor) -> Tensor:
            counts_E = args[1]
            expert_S = counts_E.new_zeros(len(output_SD), dtype=torch.int64)  # rows beyond the last expert's are empty
            own_S = torch.repeat_interleave(torch.arange(len(counts_E), device=counts_E.device), counts_E)
            expert_S[: len(own_S)] = own_S
            return edit(output_SD, expert_S, rows.tokens(len(output_SD))).to(output_SD.dtype)

        stack.callback(layer.router.register_forward_hook(rows.travel).remove)
        stack.callback(layer.experts.register_forward_hook(edited).remove)
