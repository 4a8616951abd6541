"""Where each parameter's numbers are in a checkpoint: what tensors it is made of, under which names.

transformers fuses on loading what checkpoints keep apart (the experts of a block into one tensor) and renames;
its own tables of conversions say how, and are all that is used here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
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
            for where, start, stop in _overlaps(piece, shard):
                target = into[where][0] if piece.stacked else into[where]
                if piece.stacked and shard.dim == 0:  # a member of the stack, as a whole
                    files.read_into(piece.tensor, target)
                else:
                    files.read_into(piece.tensor, target, shard.dim - piece.stacked, start, stop)


@dataclass(frozen=True)
class Converted:
    """A parameter that only transformers' own conversion can make, from whole tensors."""

    converter: WeightConverter
    tensors: Mapping[str, list[str]]
    """Names of the tensors under each of the converter's patterns."""
    first: str
    """The parameter that the conversion is named after, the first of those it makes."""
    name: str
    model: Any
    """What a conversion asks of the model: its configuration, and the shapes of parameters before they were split."""

    def read(self, files: TensorFiles, shard: Shard, into: Tensor) -> None:
        """Make the whole parameter, keep this rank's part."""
        converter = deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                read = partial(files.read, name)  # its type says a tensor, it takes what makes one
                converter.add_tensor(self.first, name, pattern, read)  # type: ignore[arg-type]
        made = converter.convert(self.first, model=self.model, config=self.model.config)[self.name]
        into.copy_(shard.take(made[0] if isinstance(made, list) else made))


Source = Assembled | Converted


def _overlaps(piece: Piece, shard: Shard) -> Iterator[tuple[tuple[slice, ...], int, int | None]]:
    """Where each part of `piece` that is this rank's lies in the rank's parameter, and its range in the piece along the
    shard's dimension."""
    where = [slice(start, start + size) for start, size in zip(piece.at, piece.shape, strict=True)]
    if shard.ranges is None:
        yield tuple(where), 0, None
        return
    begin, end = where[shard.dim].start, where[shard.dim].stop
    filled = 0
    for start, stop in shard.ranges:
        low, high = max(start, begin), min(stop, end)
        if low < high:
            where[shard.dim] = slice(filled + low - start, filled + high - start)
            yield tuple(where), low - begin, high - begin
        filled += stop - start


def find_sources(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Source], list[str]]:
    """The source of every tensor of `model`'s state that the checkpoint has, and the checkpoint's names that fit none.

    `shapes` are those of the checkpoint's tensors. `model` learns by which conversions they fit it, as loading by
    transformers would tell it, so that it is saved under the same names again. Raises UserError where a tensor has
    another shape than the model.
    """
    state = model.state_dict()
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    whole = SimpleNamespace(config=model.config, get_parameter=empty.__getitem__)
    groups, unused = _grouped(model, state, shapes)
    sources: dict[str, Source] = {}
    for first, (converter, tensors) in groups.items():
        pieces = _pieces(converter, tensors, shapes)
        if pieces is not None:
            _check_cover(first, tuple(state[first].shape), pieces)
            sources[first] = Assembled(pieces)
            continue
        assert converter is not None
        targets = converter.target_patterns
        made = [first.replace(targets[0], target) for target in targets]
        sources |= {name: Converted(converter, tensors, first, name, whole) for name in made if name in state}
    return sources, unused


def unused_tensors(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of a checkpoint's tensors, whose shapes are given, that are no part of ``model``: heads that predict
    further tokens, say."""
    conversions = getattr(model, "_weight_conversions", None)
    _, unused = _grouped(model, model.state_dict(), shapes)
    # transformers notes this on models, which does not declare it: here and below.
    model._weight_conversions = conversions  # type: ignore[assignment]
    return unused


_Groups = dict[str, tuple[WeightConverter | None, dict[str, list[str]]]]
"""By the name of a parameter: the conversion that makes it, as the first of all it makes, and the checkpoint's tensors
that go into it, by the pattern that matched them."""


def _grouped(
    model: PreTrainedModel, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[_Groups, list[str]]:
    """Checkpoint names by the parameter they go into, in the order that conversions expect, and those that fit none."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, meta = model.base_model_prefix, dict(state)
    groups: _Groups = {}
    unused = []
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in state and name in state:  # renamed by a rule that was meant for an older layout
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        if renamed not in state:
            unused.append(name)
            continue
        _, tensors = groups.setdefault(renamed, (by_pattern[pattern] if pattern else None, {}))
        tensors.setdefault(pattern or name, []).append(name)
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]  # type: ignore[assignment]
    return groups, unused


def _pieces(
    converter: WeightConverter | None, tensors: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Piece, ...] | None:
    """Pieces of a parameter that is a tensor as it is, or is stacked, concatenated, or both; None for any other."""
    if converter is None:
        name = list(tensors.values())[-1][-1]
        return (Piece(name, (0,) * len(shapes[name]), shapes[name]),)
    operations: list[Any] = list(converter.operations)
    stacked = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    joins = operations[1:] if stacked else operations
    if len(converter.target_patterns) > 1 or len(joins) > 1:
        return None
    if joins and (not isinstance(joins[0], Concatenate) or joins[0].num_shards_attribute):
        return None
    pieces, offset = [], 0
    for pattern in converter.source_patterns:
        names = tensors.get(pattern, [])
        for index, name in enumerate(names):
            shape = (1, *shapes[name]) if stacked else shapes[name]
            at = [0] * len(shape)
            if joins:
                at[joins[0].dim] = offset
                offset += shape[joins[0].dim] if not stacked or name == names[-1] else 0
            if stacked:
                at[0] = index
            pieces.append(Piece(name, tuple(at), shape, stacked))
    return tuple(pieces)


def _check_cover(name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Raise where the pieces do not fill the parameter exactly."""
    inside = all(
        len(piece.at) == len(shape)
        and all(start + size <= whole for start, size, whole in zip(piece.at, piece.shape, shape, strict=True))
        for piece in pieces
    )
    found = sum(math.prod(piece.shape) for piece in pieces)
    if not inside or found != math.prod(shape):
        raise UserError(
            f"the checkpoint's {pieces[0].tensor} {list(pieces[0].shape)}"
            + (f" and {len(pieces) - 1} more tensors" if len(pieces) > 1 else "")
            + f" do not make up {name}, which has the shape {list(shape)} by config.json; "
            "download or copy the model again"
        )
