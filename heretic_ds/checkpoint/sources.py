"""Where each parameter's numbers are in a checkpoint: what tensors it is made of, under which names.

transformers fuses on loading what checkpoints keep apart (the experts of a block into one tensor) and renames;
its own tables of conversions say how, and are all that is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from heretic_ds.checkpoint.files import TensorFiles
from heretic_ds.checkpoint.shards import Shard
from heretic_ds.errors import UserError


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor as a box within a parameter."""

    tensor: str
    at: tuple[int, ...]
    """Where the box starts in the parameter."""
    shape: tuple[int, ...]
    """Of the box; the tensor's own where nothing is stacked."""
    stacked: bool = False
    """Whether the tensor is one of a stack along dimension 0, which it has not itself."""


@dataclass(frozen=True)
class Assembled:
    """A parameter made of tensors that lie side by side in it: any part of it can be read alone."""

    pieces: tuple[Piece, ...]

    def read(self, files: TensorFiles, shard: Shard, into: Tensor) -> None:
        """Copy this rank's part into `into`, converting dtype and device."""
        for piece in self.pieces:
            for part in _parts(piece, shard):
                part.read_into(files, into[part.where])


@dataclass(frozen=True)
class WholeModel:
    """What a conversion asks of the model: the shapes of its parameters, before they were split."""

    config: Any
    state: Mapping[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        """The whole parameter, without numbers."""
        return self.state[name]


@dataclass(frozen=True)
class Converted:
    """A parameter that only transformers' own conversion can make, from whole tensors."""

    converter: WeightConverter
    tensors: Mapping[str, list[str]]
    """Names of the tensors under each of the converter's patterns."""
    first: str
    """The parameter that the conversion is named after, the first of those it makes."""
    name: str
    model: WholeModel

    def read(self, files: TensorFiles, shard: Shard, into: Tensor) -> None:
        """Make the whole parameter, keep this rank's part."""
        converter = deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                converter.add_tensor(self.first, name, pattern, partial(files.read, name))  # type: ignore[arg-type]
        made = converter.convert(self.first, model=self.model, config=self.model.config)[self.name]
        into.copy_(shard.take(made[0] if isinstance(made, list) else made))


Source = Assembled | Converted


@dataclass(frozen=True)
class _Part:
    """The overlap of a piece with one range of a shard."""

    tensor: str
    dim: int
    start: int
    stop: int | None
    where: tuple[slice, ...]
    stacked: bool

    def read_into(self, files: TensorFiles, target: Tensor) -> None:
        files.read_into(self.tensor, target[0] if self.stacked else target, self.dim, self.start, self.stop)


def _parts(piece: Piece, shard: Shard) -> list[_Part]:
    """What of `piece` belongs to this rank, and where it lies in the rank's part of the parameter."""
    where = [slice(start, start + size) for start, size in zip(piece.at, piece.shape, strict=True)]
    if shard.ranges is None:
        return [_Part(piece.tensor, 0, 0, None, tuple(where), piece.stacked)]
    parts, filled = [], 0
    begin, end = piece.at[shard.dim], piece.at[shard.dim] + piece.shape[shard.dim]
    for start, stop in shard.ranges:
        low, high = max(start, begin), min(stop, end)
        if low < high:
            where[shard.dim] = slice(filled + low - start, filled + high - start)
            if piece.stacked and shard.dim == 0:  # a member of the stack, as a whole
                parts.append(_Part(piece.tensor, 0, 0, None, tuple(where), True))
            else:
                dim = shard.dim - piece.stacked
                parts.append(_Part(piece.tensor, dim, low - begin, high - begin, tuple(where), piece.stacked))
        filled += stop - start
    return parts


@dataclass
class _Collected:
    """The checkpoint tensors that go into one conversion, by the pattern that matched them."""

    converter: WeightConverter | None
    tensors: dict[str, list[str]] = field(default_factory=dict)


def find_sources(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Source], list[str]]:
    """The source of every tensor of `model`'s state that the checkpoint has, and the checkpoint's names that fit none.

    `shapes` are those of the checkpoint's tensors. Raises UserError where a tensor has another shape than the model.
    """
    state = model.state_dict()
    whole = WholeModel(model.config, {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()})
    collected, unused = _collect(model, state, shapes)
    sources: dict[str, Source] = {}
    for first, group in collected.items():
        for name, source in _sources(whole, first, group, state, shapes).items():
            if isinstance(source, Assembled):
                _check_cover(name, tuple(state[name].shape), source)
            sources[name] = source
    return sources, unused


def _collect(
    model: PreTrainedModel, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Collected], list[str]]:
    """Checkpoint names grouped by the (first) parameter they go into, in the order that conversions expect."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, meta = model.base_model_prefix, dict(state)
    collected: dict[str, _Collected] = {}
    unused = []
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in state and name in state:  # renamed by a rule that was meant for an older layout
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        if renamed not in state:
            unused.append(name)
            continue
        group = collected.setdefault(renamed, _Collected(by_pattern[pattern] if pattern else None))
        group.tensors.setdefault(pattern or name, []).append(name)
    return collected, unused


def _sources(
    whole: WholeModel,
    first: str,
    group: _Collected,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Source]:
    """Sources of all parameters that come out of one conversion."""
    names = [name for tensors in group.tensors.values() for name in tensors]
    if group.converter is None:
        return {first: Assembled((Piece(names[-1], (0,) * len(shapes[names[-1]]), shapes[names[-1]]),))}
    targets = group.converter.target_patterns
    if len(targets) == 1 and (pieces := _side_by_side(group, shapes)) is not None:
        return {first: Assembled(pieces)}
    made = [first.replace(targets[0], target) for target in targets]
    return {name: Converted(group.converter, group.tensors, first, name, whole) for name in made if name in state}


def _side_by_side(group: _Collected, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Piece, ...] | None:
    """Pieces of a parameter that is stacked, concatenated, or both; None for any other conversion."""
    assert group.converter is not None
    operations: list[Any] = list(group.converter.operations)
    stacked = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    rest = operations[1:] if stacked else operations
    if any(not isinstance(operation, Concatenate) or operation.num_shards_attribute for operation in rest):
        return None
    if len(rest) > 1:
        return None
    dim = rest[0].dim if rest else None
    pieces, offset = [], 0
    for pattern in group.converter.source_patterns:
        tensors = group.tensors.get(pattern, [])
        for index, name in enumerate(tensors):
            shape = (1, *shapes[name]) if stacked else shapes[name]
            at = [0] * len(shape)
            if dim is not None:
                at[dim] = offset
            if stacked:
                at[0] = index
            elif dim is not None:
                offset += shape[dim]
            pieces.append(Piece(name, tuple(at), shape, stacked))
        if stacked and dim is not None and tensors:
            offset += (1, *shapes[tensors[0]])[dim]
    return tuple(pieces)


def _check_cover(name: str, shape: tuple[int, ...], source: Assembled) -> None:
    """Raise where the pieces do not fill the parameter exactly."""
    inside = all(
        len(piece.at) == len(shape)
        and all(start + size <= whole for start, size, whole in zip(piece.at, piece.shape, shape, strict=True))
        for piece in source.pieces
    )
    found = sum(math.prod(piece.shape) for piece in source.pieces)
    if not inside or found != math.prod(shape):
        pieces = source.pieces
        raise UserError(
            f"the checkpoint's {pieces[0].tensor} {list(pieces[0].shape)}"
            + (f" and {len(pieces) - 1} more tensors" if len(pieces) > 1 else "")
            + f" do not make up {name}, which has the shape {list(shape)} by config.json; "
            "download or copy the model again"
        )


def empty_like_part(shard: Shard, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for this rank's part."""
    make = torch.zeros if shard.zeroed else torch.empty
    return make(shard.local_shape, dtype=dtype, device=device)
