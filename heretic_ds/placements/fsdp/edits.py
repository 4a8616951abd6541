"""Edits of weights that are gathered for a moment: computed from whole writers, kept by every rank for its own part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.edits.experts import ExpertEdit
from heretic_ds.edits.outputs import DenseEdit, OutputEdits
from heretic_ds.edits.tables import table_budget
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.placements.fsdp.units import Units, gathered


class GatheringEditor(WeightEditor):
    """Edits writers block by block, while a block is gathered; ranks have to ask for the same edits together.

    Each keeps the originals of its own parts, which come back without the others.
    """

    def __init__(self, units: Units, anatomy: Anatomy) -> None:
        super().__init__(units.model, anatomy)
        self._units, self._anatomy = units, anatomy

    @torch.no_grad()
    def set_edit(self, edit: Edit | None) -> None:
        """Make the weights those of ``edit`` (None: the originals). Always computed from the originals."""
        if self._present == (edit,):
            return
        self._present = ()
        for name in list(self._edited):
            self._units.parts[name].own.copy_(self._originals[name])
            self._edited.discard(name)
        for block, writers in groupby(self._writers if edit is not None else (), key=lambda writer: writer.block):
            strengths = [(writer, edit.strength(writer.component, block)) for writer in writers if edit is not None]
            if any(strength for _, strength in strengths):
                with gathered(self._model, self._anatomy, block):
                    for writer, strength in strengths:
                        if edit is not None and strength:
                            self._edit(writer, edit, strength)
        self._present = (edit,)

    def _edit(self, writer: Writer, edit: Edit, strength: float) -> None:
        part = self._units.parts[writer.weight]
        if writer.weight not in self._originals:
            self._originals[writer.weight] = part.own.to("cpu", copy=True)
        super()._edit(writer, edit, strength)
        part.own.copy_(part.of(self._model.get_parameter(writer.weight)))


class GatheredOutputEdits(OutputEdits):
    """Edits of outputs, whose tables are made while a block is gathered; ranks have to take the same edits together."""

    @classmethod
    def budget(cls, model: nn.Module) -> int:
        """Of the rank's own part of the weights: tables are whole on each of them."""
        cut = next(parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
        return table_budget(model, cut.device_mesh.size())

    def _set(self, writer: Writer, edits: Sequence[Edit | None]) -> DenseEdit | ExpertEdit:
        by_pass = writer.experts is not None and self._ablation.row_norm == "full" and not self._keeps_tables
        if writer.weight in self._edits and not by_pass:
            return super()._set(writer, edits)
        with gathered(self._model, self._anatomy, writer.block):
            return super()._set(writer, edits)
