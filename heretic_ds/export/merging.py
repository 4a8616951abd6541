"""An adapter's files read back, and added to the original's weights from file to file: what loads as one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heretic_ds.ablation import Ablation, Edit, LowRank
from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.checkpoint import Checkpoint, TensorFiles
from heretic_ds.checkpoint.conversions import Assembled
from heretic_ds.checkpoint.open import OpenedModel
from heretic_ds.checkpoint.source import WEIGHT_FILES
from heretic_ds.edits.adapters import AdaptedWriter, Adapter
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, is_swapped
from heretic_ds.export.streaming import EditedFiles
from heretic_ds.foreign.reading import read_json, reading

_AGAIN = "export it again"


def read_adapter(folder: Path, anatomy: Anatomy, model: nn.Module) -> Adapter:
    """The adapter in a folder, as `write_adapter` has written it; ``model``, whose weights may be on the meta device,
    tells how its experts lie in memory. Raises UserError for files that are damaged or another model's."""
    config, file = read_json(folder / ADAPTER_CONFIG, _AGAIN), folder / ADAPTER_WEIGHTS
    with reading(file, _AGAIN, "is damaged"):
        tensors, adapted = load_file(file), []
        rank, scale = int(config["r"]), config["lora_alpha"] / config["r"]
        for writer in anatomy.writers:
            name = f"{PREFIX}{writer.module}"
            if f"{name}.lora_A.weight" not in tensors:
                continue
            first, second = (tensors.pop(f"{name}.lora_{matrix}.weight").float() for matrix in "AB")
            adapted.append(AdaptedWriter(writer, tuple(_parts(writer, first, second * scale, rank, model))))
        if tensors:
            raise UserError(f"{file} holds {min(tensors)}, which is no part of the model; {_AGAIN}")
    return Adapter(tuple(adapted))


def _parts(writer: Writer, first: Tensor, second: Tensor, rank: int, model: nn.Module) -> Iterator[LowRank]:
    """BA of a writer, or of each of its experts, from `lora_A` and `lora_B`."""
    if writer.experts is None:
        yield LowRank(second, first, 0.0, 0.0)
        return
    swapped = is_swapped(model, writer)
    of_experts = second.view(len(second), rank, writer.experts).unbind(-1)
    for in_RK, out_DR in zip(first.split(rank), of_experts, strict=True):
        yield LowRank(in_RK.T, out_DR.T, 0.0, 0.0) if swapped else LowRank(out_DR, in_RK, 0.0, 0.0)


@dataclass(frozen=True)
class MergedFiles(EditedFiles):
    """The weight files of a model with an adapter added to it."""

    edits: Mapping[str, Any]
    """What is added to each matrix of a tensor, in their order, and whether the tensor holds them transposed."""

    @classmethod
    def of(
        cls, opened: OpenedModel, anatomy: Anatomy, ablation: Ablation, adapter: Adapter, dtype: torch.dtype
    ) -> MergedFiles:
        """The original's files with an adapter. Raises UserError for checkpoints that cannot be edited file to file."""
        _, plain = EditedFiles.plan(opened, anatomy, ablation, Edit(None, {}), dtype)
        _, checkpoint = opened.empty_model(dtype)
        told = {entry.name: getattr(plain, entry.name) for entry in fields(EditedFiles)}
        return cls(**{**told, "edits": _added(checkpoint, adapter)})

    def _edited(self, tensors: TensorFiles, name: str) -> Iterator[Tensor]:
        form, (parts, across) = self.forms[name], self.edits[name]
        matrix = torch.empty(form.shape[-2:], dtype=form.dtype)
        for number, part in enumerate(parts):
            tensors.read_numbers_into(name, matrix.view(-1), number * matrix.numel())
            weight_DK = matrix.T if across else matrix
            weight_DK.copy_(weight_DK.float() + part.out_DR @ part.in_RK)
            yield matrix


def _added(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, tuple[list[LowRank], bool]]:
    found = {}
    for adapted in adapter.writers:
        writer, source = adapted.writer, checkpoint.sources[adapted.writer.weight]
        across = writer.layout in ("KD", "EKD")
        for piece in source.pieces if isinstance(source, Assembled) else ():
            first = piece.at[0] if piece.stacked else 0
            count = 1 if piece.stacked else len(adapted.parts)
            found[piece.tensor] = (list(adapted.parts[first : first + count]), across)
    return found


def link_companions(opened: OpenedModel, folder: Path) -> None:
    """Let a folder of weight files have all else that the original's folder holds."""
    weights = {*WEIGHT_FILES, *(info.file for info in opened.headers.values())}
    for file in opened.source.folder.iterdir():
        if file.name not in weights:
            (folder / file.name).symlink_to(file.resolve())
