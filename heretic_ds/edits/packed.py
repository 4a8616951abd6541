"""Edits of a model some of whose weights are packed in few bits: there the outputs of writers are edited instead.

Packing an edited weight again would round it anew, and what is exported is not packed. So a packed weight is only read,
one matrix at a time, and an edit is a hook on its module, by the same formulas (:mod:`heretic_ds.ablation.edit`) as
where many trials share a pass. Writers that are not packed are edited in place, as ever.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.anatomy import Anatomy, Writer, is_packed
from heretic_ds.edits.outputs import DenseEdit
from heretic_ds.edits.tables import Rows, WriterTables
from heretic_ds.edits.weights import WeightEditor


def editor_of(model: nn.Module, anatomy: Anatomy) -> WeightEditor:
    """What brings a model's writers into the state of an edit, whether their weights are packed or not."""
    packed = any(is_packed(model.get_submodule(writer.module)) for writer in anatomy.writers)
    return PackedEditor(model, anatomy) if packed else WeightEditor(model, anatomy)


class PackedEditor(WeightEditor):
    """Brings the writers of one model into the state that an edit asks for, and leaves packed weights as they are."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__(model, anatomy)
        self._hooks: dict[str, RemovableHandle] = {}
        self._edits: dict[str, DenseEdit] = {}
        """What was made of packed writers for the directions of now; edits to come are written into its memory."""
        self._all = Rows(next(model.parameters()).device)
        self._all.assign([0])

    def prepare(self, ablation: Ablation) -> None:
        """Take the directions of all edits to come."""
        super().prepare(ablation)
        self._edits.clear()

    def _restore(self, writer: Writer) -> None:
        if not is_packed(self._model.get_submodule(writer.module)):
            super()._restore(writer)
        elif (hook := self._hooks.pop(writer.weight, None)) is not None:
            hook.remove()

    def _edit(self, writer: Writer, edit: Edit, strength: float) -> None:
        module = self._model.get_submodule(writer.module)
        if not is_packed(module):
            super()._edit(writer, edit, strength)
            return
        with torch.inference_mode():
            made = self._dense(writer, edit)  # which may fail, for want of memory say; then nothing is edited
        self._edited.add(writer.weight)
        self._hooks[writer.weight] = module.register_forward_hook(made)

    def _dense(self, writer: Writer, edit: Edit) -> DenseEdit:
        """The edit of a writer's outputs, whichever row they belong to."""
        known = self._edits.get(writer.weight)
        if known is not None:
            known.set([edit])
            return known
        if self._ablation is None:
            raise RuntimeError("an edit was asked for before prepare() gave the directions")
        tables = WriterTables(self._model, writer, self._ablation, None)
        bias_D = None if writer.bias is None else self._model.get_parameter(writer.bias).detach()
        made = self._edits[writer.weight] = DenseEdit(tables, bias_D, [edit], self._all)
        return made
