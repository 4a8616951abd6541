"""Edits a checkpoint from file to file, one tensor at a time: for models that no single process holds whole.

Every tensor is copied but those of writers, which go through the same edit as weights in memory. Ranks share out the
files, and each file is the same, byte for byte, whichever rank writes it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from heretic_ds.ablation import Ablation, Edit, edit_weight_
from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.checkpoint import Checkpoint, TensorFiles, bnb
from heretic_ds.checkpoint.conversions import Assembled, Piece
from heretic_ds.checkpoint.open import LoadedModel, OpenedModel
from heretic_ds.checkpoint.source import STORED_DTYPES, WEIGHT_FILES, TensorInfo
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import stored_gain
from heretic_ds.export.carried import copied
from heretic_ds.export.target import failures_named
from heretic_ds.export.tensor_file import TensorForm, write_tensors
from heretic_ds.foreign.reading import reading
from heretic_ds.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorEdit:
    """What happens to one tensor of the checkpoint."""

    writer: Writer
    direction_RD: Tensor
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
        pieces = stored_pieces(checkpoint, writer)
        if not pieces:
            raise UserError(
                f"{writer.weight} is stored in a form that cannot be edited from file to file; set evaluate=replicated"
            )
        gain_D = stored_gain(checkpoint, writer)
        direction_RD = ablation.writer_directions(writer.block, gain_D, edit.direction_index)
        plan.update({piece.tensor: TensorEdit(writer, direction_RD, strength) for piece in pieces})
    return plan


def stored_pieces(checkpoint: Checkpoint, writer: Writer) -> tuple[Piece, ...]:
    """The tensors that a writer is stored as, each of whole matrices; none where these cannot be edited as they lie."""
    source, shape = checkpoint.sources[writer.weight], checkpoint.shapes[writer.weight]
    pieces = source.pieces if isinstance(source, Assembled) else ()
    return pieces if all(piece.shape[-2:] == shape[-2:] for piece in pieces) else ()


@dataclass(frozen=True)
class EditedFiles:
    """The weight files of an edited model, each under the name of the one it is made from, and their index."""

    source: Path
    """Folder of the original checkpoint."""
    headers: Mapping[str, TensorInfo]
    """What the original's files hold, by tensor name."""
    forms: Mapping[str, TensorForm]
    """What is written, by tensor name."""
    edits: Mapping[str, TensorEdit]
    """By tensor name; all others are copied."""
    row_norm: str
    places: Mapping[str, str]
    """The file that each tensor is written to, by tensor name."""

    @classmethod
    def plan(
        cls,
        opened: OpenedModel,
        anatomy: Anatomy,
        ablation: Ablation,
        edit: Edit,
        dtype: torch.dtype,
        max_shard_size: str | None = None,
    ) -> tuple[LoadedModel, EditedFiles]:
        """The model without its weights, as the card and the manifest describe it, and its weight files.

        Weights are cast to ``dtype``, in which the edit was verified, as loading would. Files are the original's, or
        as large as ``max_shard_size`` allows; packed weights are unpacked. Raises UserError for checkpoints that are
        quantised otherwise, or not safetensors.
        """
        if not (opened.in_parts or (opened.headers and opened.quantization == bnb.METHOD)):
            kind = "quantised" if opened.headers else "pickled"
            raise UserError(f"{opened.source.name} is {kind}, and can only be written whole; set evaluate=replicated")
        skeleton, checkpoint = opened.empty_model(dtype)
        edits, kept = plan_edits(checkpoint, anatomy, ablation, edit), _kept_dtypes(checkpoint, dtype)
        forms = {}
        for name, info in opened.headers.items():
            stored = STORED_DTYPES[info.dtype]
            forms[name] = TensorForm(info.shape, kept.get(name, dtype) if stored.is_floating_point else stored)
        loaded = opened.loaded(skeleton, dtype)
        places = _places(opened.headers, forms, max_shard_size)
        return loaded, cls(opened.source.folder, opened.headers, forms, edits, ablation.row_norm, places)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file's tensors as they are written, by the file's name."""
        sizes: dict[str, int] = {}
        for name in sorted(self.headers):
            file = self.places[name]
            sizes[file] = sizes.get(file, 0) + self.forms[name].size
        return sizes

    def write(self, world: World, folder: Path, target: Path) -> None:
        """Write all files to ``folder``, which rank 0 has made; every rank takes part, with files of its own.

        A rank that does not see the folder, since its machine shares no disk with rank 0's, leaves the work to the
        others. In memory is one matrix at a time. An error on any rank is raised on all of them; ``target`` is what
        it calls the folder.
        """
        mark = Path(world.decide(lambda: str(_marked(folder, target))))
        seen = world.gather(os.path.isfile(mark))  # no also where the disk answers with an error
        writers = [rank for rank, sees in enumerate(seen) if sees]
        mine = shared_out(self.sizes, len(writers))[writers.index(world.rank)] if world.rank in writers else []
        if len(writers) < world.size:
            log.info("%d of %d ranks see the export folder, and write the model", len(writers), world.size)

        def write_mine() -> None:
            with failures_named(target):
                for file in mine:
                    self.write_file(folder, file)

        def end() -> None:
            with failures_named(target):
                mark.unlink()
                self._write_index(folder)

        world.agree(write_mine, "writing the model")
        world.decide(end)

    @torch.no_grad()
    def write_file(self, folder: Path, file: str) -> None:
        """Write one file, with the other metadata that the original's has."""
        forms = {name: self.forms[name] for name, place in self.places.items() if place == file}
        first = self.source / self.headers[next(iter(forms))].file
        with reading(first), safe_open(first, framework="pt") as original:
            metadata = {**(original.metadata() or {}), "format": "pt"}
        tensors = TensorFiles(self.source, self.headers)

        def parts(name: str) -> Iterator[Tensor]:
            return self._edited(tensors, name) if name in self.edits else copied(tensors, name, self.forms[name])

        write_tensors(folder / file, forms, parts, metadata)

    def _edited(self, tensors: TensorFiles, name: str) -> Iterator[Tensor]:
        """One matrix at a time, of which a fused writer [E, ...] has many, in memory that the next overwrites."""
        form, change = self.forms[name], self.edits[name]
        matrix = torch.empty(form.shape[-2:], dtype=form.dtype)
        across = change.writer.layout in ("KD", "EKD")
        for start in range(0, math.prod(form.shape), matrix.numel()):
            tensors.read_numbers_into(name, matrix.view(-1), start)
            weight_DK = matrix.T if across else matrix
            edit_weight_(weight_DK, change.direction_RD, change.strength, self.row_norm)
            yield matrix

    def _write_index(self, folder: Path) -> None:
        """The index of several files; one alone has none."""
        if list(self.sizes) == [WEIGHT_FILES[0]]:
            return
        content = {
            "metadata": {"total_size": sum(self.sizes.values())},
            "weight_map": {name: self.places[name] for name in sorted(self.headers)},
        }
        (folder / WEIGHT_FILES[1]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _places(
    headers: Mapping[str, TensorInfo], forms: Mapping[str, TensorForm], max_shard_size: str | None
) -> dict[str, str]:
    """The file of each tensor: the original's, or files of a size, filled in the order in which tensors lie there."""
    if max_shard_size is None:
        return {name: info.file for name, info in headers.items()}
    order = sorted(headers, key=lambda name: (headers[name].file, headers[name].begin))
    split = split_state_dict_into_shards_factory(
        {name: forms[name] for name in order},
        get_storage_size=lambda form: form.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return split.tensor_to_filename


def _marked(folder: Path, target: Path) -> Path:
    """A new file in the folder, by which ranks of other machines know that theirs is the same."""
    mark = folder / f".{uuid4().hex}"
    with failures_named(target):
        mark.touch()
    return mark


def _kept_dtypes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Checkpoint tensors that the model keeps in another dtype than the rest (float32 routers, say)."""
    kept: dict[str, torch.dtype] = {}
    for name, source in checkpoint.sources.items():
        if checkpoint.dtypes[name] != dtype and isinstance(source, Assembled):
            kept.update({piece.tensor: checkpoint.dtypes[name] for piece in source.pieces})
    return kept


def shared_out(sizes: Mapping[str, int], writers: int) -> list[list[str]]:
    """Files by writer: the largest first, each to whoever has the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(writers)]
    totals = [0] * writers
    for file in sorted(sizes, key=lambda file: (-sizes[file], file)):
        least = totals.index(min(totals))
        shares[least].append(file)
        totals[least] += sizes[file]
    return shares
