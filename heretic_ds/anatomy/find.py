"""Finds a model's anatomy by the tables; refuses, with the names found, what the tables do not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from heretic_ds.anatomy.model import Anatomy, Writer
from heretic_ds.anatomy.packing import is_packed
from heretic_ds.anatomy.tables import (
    DECODERS,
    FUSED_READERS,
    NORM_LAYOUTS,
    NORM_OFFSETS,
    READER_PATHS,
    TRANSPOSED_EXPERTS,
    WRITERS,
    DecoderRow,
    NormLayout,
    WriterRow,
)
from heretic_ds.errors import UserError

_WRITER_ROWS = {row.path: row for row in WRITERS}
_NORM_NAMES = frozenset().union(*(layout.names for layout in NORM_LAYOUTS))
_ABSENT = object()


def find_anatomy(model: nn.Module) -> Anatomy:
    """The decoder's blocks, norms and writers; reads names and shapes only, so meta-device models will do.

    Raises UserError, listing what was found, where there is not exactly one decoder, a block has no writer or
    lacks one component, its norms are in no known layout, or a module of a block could be an unknown writer.
    """
    decoder_path, row = _find_decoder(model)
    decoder = model.get_submodule(decoder_path)
    blocks_path = _join(decoder_path, row.blocks)
    blocks = list(model.get_submodule(blocks_path).children())
    width = _stream_width(decoder)
    writers = [
        writer
        for index, block in enumerate(blocks)
        for writer in _block_writers(block, index, f"{blocks_path}.{index}", width)
    ]
    last_block = f"{blocks_path}.{len(blocks) - 1}"
    has_norm = isinstance(getattr(decoder, row.final_norm), nn.Module)
    return Anatomy(
        decoder=decoder_path,
        blocks=blocks_path,
        embedding=_join(decoder_path, row.embedding),
        final_norm=_join(decoder_path, row.final_norm) if has_norm else last_block,
        n_blocks=len(blocks),
        width=width,
        writers=tuple(writers),
    )


def has_expert_dispatch(experts: nn.Module) -> bool:
    """Whether a module of fused experts looks its forward up in transformers' `ALL_EXPERTS_FUNCTIONS`.

    These two attributes are what transformers' `use_experts_implementation` decorator gives to a class.
    """
    return hasattr(experts, "is_transposed") and hasattr(experts, "_apply_gate")


def _find_decoder(model: nn.Module) -> tuple[str, DecoderRow]:
    """Path and row of the one module that has a row's embedding, block list and final norm."""
    found = [(path, row) for path, module in model.named_modules() for row in DECODERS if _is_decoder(module, row)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        paths = ", ".join(path or "the root" for path, _ in found)
        raise UserError(
            f"{name} holds {len(found)} decoders ({paths}), expected exactly one: models with several text "
            "towers cannot be edited; choose another model.path"
        )
    lists = [
        f"{path} (beside {', '.join(dict(model.get_submodule(path.rpartition('.')[0]).named_children()))})"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    raise UserError(
        f"{name} has no decoder of a known layout: its module lists are {'; '.join(lists) or 'none'}; "
        "expected one beside a token embedding and a final norm, as listed in anatomy/tables.py (DECODERS)"
    )


def _is_decoder(module: nn.Module, row: DecoderRow) -> bool:
    blocks = getattr(module, row.blocks, None)
    norm = getattr(module, row.final_norm, _ABSENT)  # None: a decoder that says it has no final norm
    return (
        isinstance(blocks, nn.ModuleList)
        and len(blocks) > 0
        and isinstance(getattr(module, row.embedding, None), nn.Embedding)
        and (norm is None or isinstance(norm, nn.Module))
    )


def _stream_width(decoder: nn.Module) -> int:
    """Width D from the decoder's configuration: the embedding may be narrower than the stream (OPT)."""
    config: Any = getattr(decoder, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UserError(
            f"{type(decoder).__name__} does not say how wide its residual stream is; expected a whole number "
            "`hidden_size` in the model's config.json"
        )
    return width


def _block_writers(block: nn.Module, index: int, block_path: str, width: int) -> list[Writer]:
    """All writers of one block, in the table's sense, after checking that nothing else can be one."""
    rows = {path: _WRITER_ROWS[name] for path, name in _named_paths(block) if _is_writer(block, path, name)}
    layout = _norm_layout(block, block_path)
    _refuse_unknown(block, block_path, width, rows)
    _refuse_missing_component(block, block_path, list(rows.values()))
    return [_writer(block, path, row, layout, index, block_path, width) for path, row in rows.items()]


def _named_paths(block: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, path with whole numbers as `*`) of every submodule, in the order of the model."""
    for path, _ in block.named_modules():
        yield path, ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _is_writer(block: nn.Module, path: str, name: str) -> bool:
    row = _WRITER_ROWS.get(name)
    # A module list of experts bears the name of fused experts; its members have rows of their own.
    return row is not None and (row.fused is None or hasattr(block.get_submodule(path), row.fused))


def _norm_layout(block: nn.Module, block_path: str) -> NormLayout:
    names = frozenset(name for name, _ in block.named_children()) & _NORM_NAMES
    for layout in NORM_LAYOUTS:
        if layout.names == names:
            return layout
    raise UserError(
        f"{block_path} ({type(block).__name__}) has the norms {', '.join(sorted(names)) or '(none)'}, no "
        "known set: which of them follow writers must be added to heretic_ds/anatomy/tables.py (NORM_LAYOUTS)"
    )


def _refuse_unknown(block: nn.Module, block_path: str, width: int, rows: dict[str, WriterRow]) -> None:
    """Raise for every parameter that spans the stream on its output side and is in no table."""
    unknown = [
        f"{path}.{parameter} ({type(module).__name__} {list(tensor.shape)})"
        for path, name in _named_paths(block)
        for module in (block.get_submodule(path),)
        for parameter, tensor in module.named_parameters(recurse=False)
        if _may_write(module, parameter, tuple(tensor.shape), width) and not _is_known(path, name, parameter, rows)
    ]
    if unknown:
        raise UserError(
            f"{block_path} ({type(block).__name__}) has modules with {width} outputs, the width of the "
            f"residual stream, that are known neither as writers nor as readers: {', '.join(unknown)}; "
            "add them to heretic_ds/anatomy/tables.py (WRITERS or _READERS)"
        )


def _is_known(path: str, name: str, parameter: str, rows: dict[str, WriterRow]) -> bool:
    """Whether a table has this parameter of the submodule at `path`, whose name has `*` for numbers."""
    row = rows.get(path)
    if row is not None and row.fused is not None:
        return parameter in FUSED_READERS | {row.fused, f"{row.fused}_bias"}
    return row is not None or name in READER_PATHS or path in _NORM_NAMES


def _may_write(module: nn.Module, parameter: str, shape: tuple[int, ...], width: int) -> bool:
    """Whether this parameter of this module could give a vector of the stream's width."""
    if parameter == "bias":
        return False
    if isinstance(module, nn.Linear):
        return module.out_features == width
    if isinstance(module, Conv1D):
        return shape[-1] == width
    if isinstance(module, nn.Conv1d):
        return module.out_channels == width
    if len(shape) == 1:  # a norm between a writer and the stream
        return parameter == "weight" and shape[0] == width
    return width in shape[-2:]


def _refuse_missing_component(block: nn.Module, block_path: str, rows: list[WriterRow]) -> None:
    missing = {"attention", "mlp"} - {row.component for row in rows}
    if not missing or (rows and all(row.alone for row in rows)):
        return
    submodules = [f"{path} ({type(module).__name__})" for path, module in block.named_modules() if path]
    raise UserError(
        f"{block_path} ({type(block).__name__}) has no known writer of the {' and '.join(sorted(missing))} "
        f"component: its submodules are {', '.join(submodules)}; add the one that writes to the residual "
        "stream to heretic_ds/anatomy/tables.py (WRITERS)"
    )


def _writer(
    block: nn.Module, path: str, row: WriterRow, layout: NormLayout, index: int, block_path: str, width: int
) -> Writer:
    module, full = block.get_submodule(path), f"{block_path}.{path}"
    parameter = row.fused or "weight"
    bias = f"{row.fused}_bias" if row.fused else "bias"
    shape = _shape(module, parameter)
    memory = _memory_layout(module, row, full)
    spans = shape[memory.index("D")] if len(shape) == len(memory) else None
    if spans != width:
        raise UserError(
            f"{full}.{parameter} has the shape {list(shape)}; expected {len(memory)} dimensions, laid out "
            f"{memory}, with D = {width}, the width of the residual stream"
        )
    norms = layout.after.get(path) or layout.after.get(row.component) or ()
    return Writer(
        block=index,
        component=row.component,
        module=full,
        weight=f"{full}.{parameter}",
        bias=f"{full}.{bias}" if getattr(module, bias, None) is not None else None,
        layout=memory,
        norm=f"{block_path}.{norms[-1]}" if norms else None,
        norm_offset=_norm_offset(block, norms, block_path),
        experts=shape[0] if row.fused else None,
        inner_norm=f"{block_path}.{norms[0]}" if len(norms) > 1 else None,
        path=f"{row.path}.{row.fused}" if row.fused else row.path,
    )


def _shape(module: Any, parameter: str) -> tuple[int, ...]:
    """Of a weight; of one that is packed in few bits, that of the matrix they stand for."""
    if is_packed(module):
        return module.out_features, module.in_features
    return tuple(getattr(module, parameter).shape)


def _memory_layout(module: nn.Module, row: WriterRow, full: str) -> str:
    if row.fused:
        transposed = getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_EXPERTS)
        return "EKD" if transposed else "EDK"
    if isinstance(module, nn.Linear):
        return "DK"
    if isinstance(module, Conv1D):
        return "KD"
    raise UserError(f"{full} is a {type(module).__name__}; expected a Linear or a Conv1D as a writer")


def _norm_offset(block: nn.Module, norms: tuple[str, ...], block_path: str) -> float:
    """The offset shared by the norms behind a writer; 0 where there is none."""
    names = {name: type(block.get_submodule(name)).__name__ for name in norms}
    for name, kind in names.items():
        if kind not in NORM_OFFSETS:
            raise UserError(
                f"{block_path}.{name}, which follows a writer, is a {kind}: its gain is not known; add the "
                "class to heretic_ds/anatomy/tables.py (NORM_OFFSETS)"
            )
    return NORM_OFFSETS[names[norms[-1]]] if norms else 0.0


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
