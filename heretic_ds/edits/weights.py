"""Edits of resident weights, with the originals kept on the host so that every one comes back bit for bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heretic_ds.ablation import Ablation, Edit, Reduce, edit_weight_
from heretic_ds.anatomy import Anatomy, Writer


def sum_over(group: dist.ProcessGroup | None) -> Reduce | None:
    """Adds up a tensor over ranks between which the inputs of writers are split; None where there is one."""
    if group is None:
        return None

    def add_up(tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=group)
        return tensor

    return add_up


class WeightEditor:
    """Brings the writers of one model into the state that an edit asks for."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, reduce: Reduce | None = None) -> None:
        self._model = model
        self.reduce = reduce
        """Adds up a tensor over the ranks between which every writer's inputs are split; None where it is whole."""
        self._writers = anatomy.writers
        self._ablation: Ablation | None = None
        self._originals: dict[str, Tensor] = {}
        self._edited: set[str] = set()
        self._present: tuple[Edit | None, ...] = (None,)
        """The edit that the weights have; empty after a change that was interrupted."""

    def prepare(self, ablation: Ablation) -> None:
        """Take the directions of all edits to come."""
        self.set_edit(None)
        self._ablation = ablation

    @torch.no_grad()
    def set_edit(self, edit: Edit | None) -> None:
        """Make the weights those of ``edit`` (None: the originals). Always computed from the originals."""
        if self._present == (edit,):
            return
        self._present = ()
        for writer in self._writers:
            if writer.weight in self._edited:
                self._restore(writer)
                self._edited.discard(writer.weight)
            if edit is not None and (strength := edit.strength(writer.component, writer.block)) != 0.0:
                self._edit(writer, edit, strength)
        self._present = (edit,)

    def _restore(self, writer: Writer) -> None:
        """Bring an edited writer back."""
        writer.weight_DK(self._model).copy_(self._originals[writer.weight])

    def _edit(self, writer: Writer, edit: Edit, strength: float) -> None:
        if self._ablation is None:
            raise RuntimeError("an edit was asked for before prepare() gave the directions")
        weight_DK = writer.weight_DK(self._model)
        if writer.weight not in self._originals:
            self._originals[writer.weight] = weight_DK.detach().to("cpu", copy=True)
        gain_D = writer.norm_gain(self._model)
        direction_RD = self._ablation.writer_directions(writer.block, gain_D, edit.direction_index)
        self._edited.add(writer.weight)
        edit_weight_(weight_DK, direction_RD, strength, self._ablation.row_norm, self.reduce)
