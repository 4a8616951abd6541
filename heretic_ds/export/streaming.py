"""Edits a checkpoint from file to file, one weight file at a time: for models that no single process holds whole.

Every tensor is copied but those of writers, which go through the same edit as weights in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from heretic_ds.ablation import Ablation, Edit, edit_weight_
from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.checkpoint import Checkpoint, Shard
from heretic_ds.checkpoint.conversions import Assembled
from heretic_ds.checkpoint.open import LoadedModel, OpenedModel
from heretic_ds.checkpoint.source import WEIGHT_FILES, TensorInfo
from heretic_ds.errors import UserError


@dataclass(frozen=True)
class TensorEdit:
    """What happens to one tensor of the checkpoint."""

    writer: Writer
    direction_D: Tensor
    strength: float


def plan_edits(checkpoint: Checkpoint, anatomy: Anatomy, ablation: Ablation, edit: Edit) -> dict[str, TensorEdit]:
    """The tensors that an edit changes, by their names in the checkpoint. No weight is read but gains of norms.

    A fused writer that the checkpoint keeps apart, expert by expert, is as many tensors. Raises UserError where a
    writer is stored in a form that transformers alone can convert.
    """
    plan: dict[str, TensorEdit] = {}
    for writer in anatomy.writers:
        strength = edit.strength(writer.component, writer.block)
        if strength == 0.0:
            continue
        source, shape = checkpoint.sources[writer.weight], checkpoint.shapes[writer.weight]
        pieces = source.pieces if isinstance(source, Assembled) else ()
        if not pieces or not all(piece.shape[-2:] == shape[-2:] for piece in pieces):
            raise UserError(
                f"{writer.weight} is stored in a form that cannot be edited from file to file; set evaluate=replicated"
            )
        gain_D = _gain(checkpoint, writer)
        direction_D = ablation.writer_direction(writer.block, gain_D, edit.direction_index)
        plan.update({piece.tensor: TensorEdit(writer, direction_D, strength) for piece in pieces})
    return plan


def _gain(checkpoint: Checkpoint, writer: Writer) -> Tensor | None:
    """The gain of the norms behind a writer, read from the checkpoint."""
    if writer.norm is None:
        return None

    def read(name: str) -> Tensor:
        return checkpoint.read(name, Shard(checkpoint.shapes[name]), torch.device("cpu")).float()

    gain_D = writer.norm_offset + read(f"{writer.norm}.weight")
    if writer.inner_norm is not None:
        gain_D = gain_D * (writer.norm_offset + read(f"{writer.inner_norm}.weight"))
    return gain_D


@torch.no_grad()
def edited_tensor(tensor: Tensor, change: TensorEdit, row_norm: str) -> Tensor:
    """One tensor of the checkpoint after its edit, in its own dtype. A fused one [E, ...] holds E matrices."""
    edited = tensor.clone()
    across = change.writer.layout in ("KD", "EKD")
    edit_weight_(edited.transpose(-1, -2) if across else edited, change.direction_D, change.strength, row_norm)
    return edited


def weight_writer(
    opened: OpenedModel, anatomy: Anatomy, ablation: Ablation, edit: Edit, dtype: torch.dtype
) -> tuple[LoadedModel, Callable[[Path], None]]:
    """The model without its weights, as the card and the manifest describe it, and what writes its edited weights.

    Weights are cast to ``dtype``, in which the edit was verified, as loading would. Raises UserError for checkpoints
    that are quantised or not safetensors.
    """
    if opened.quantization is not None or not opened.headers:
        kind = "quantised" if opened.quantization is not None else "pickled"
        raise UserError(f"{opened.source.name} is {kind}, and can only be written whole; set evaluate=replicated")
    source = opened.source
    skeleton, checkpoint = opened.empty_model(dtype)
    plan = plan_edits(checkpoint, anatomy, ablation, edit)
    kept = _kept_dtypes(checkpoint, dtype)
    loaded = opened.loaded(skeleton, dtype)
    return loaded, lambda folder: _write(folder, source.folder, opened.headers, plan, ablation.row_norm, dtype, kept)


def _kept_dtypes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Checkpoint tensors that the model keeps in another dtype than the rest (float32 routers, say)."""
    kept: dict[str, torch.dtype] = {}
    for name, source in checkpoint.sources.items():
        if checkpoint.dtypes[name] != dtype and isinstance(source, Assembled):
            kept.update({piece.tensor: checkpoint.dtypes[name] for piece in source.pieces})
    return kept


def _write(
    folder: Path,
    source: Path,
    headers: Mapping[str, TensorInfo],
    plan: Mapping[str, TensorEdit],
    row_norm: str,
    dtype: torch.dtype,
    kept: Mapping[str, torch.dtype],
) -> None:
    """Write every weight file of ``source`` to ``folder``, and their index; in memory is one file's tensors."""
    files, size = sorted({info.file for info in headers.values()}), 0
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(source / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor = shard.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(kept.get(name, dtype))
                tensors[name] = edited_tensor(tensor, plan[name], row_norm) if name in plan else tensor
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if files != [WEIGHT_FILES[0]]:
        content = {
            "metadata": {"total_size": size},
            "weight_map": {name: headers[name].file for name in sorted(headers)},
        }
        (folder / WEIGHT_FILES[1]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
