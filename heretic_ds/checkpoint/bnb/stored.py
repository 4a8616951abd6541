"""Files in which bitsandbytes has packed matrices, read as if it had not: one matrix at a time is unpacked.

Beside the codes of ``X.weight`` lie, for 4 bits, tensors whose names go on from its own, of which one holds shape and
dtype as JSON; for 8 bits ``X.SCB``, a scale for each row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heretic_ds.anatomy import four_bits_unpacked
from heretic_ds.checkpoint.source import STORED_DTYPES, TensorInfo
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import AGAIN, check_shape, parse_json
from heretic_ds.foreign.text import in_one_line

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_SCALES, _FORMAT = "SCB", "weight_format"
_LIMIT = 2**16
_SHAPE = {"shape": [int], "dtype": str}
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in STORED_DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True)
class PackedMatrix(TensorInfo):
    """A matrix as it would lie in a file if it were not packed; ``file`` and ``begin`` are those of its codes."""

    codes: TensorInfo
    parts: Mapping[str, TensorInfo]
    """What lies beside the codes, by the ends of names: ``absmax``, or ``SCB``."""


def unpacked_headers(
    headers: Mapping[str, TensorInfo], folder: Path, read: Callable[[TensorInfo], Tensor]
) -> dict[str, TensorInfo]:
    """Headers of files as they would be if bitsandbytes had not packed them; ``read`` gives a tensor as it is stored.

    Raises UserError where what lies beside codes does not fit them.
    """
    found: dict[str, TensorInfo] = {}
    beside: set[str] = set()
    for name, info in headers.items():
        stem = name.removesuffix("weight")
        state = next((name + end for end in _STATES if name + end in headers), None)
        if state is not None:
            parts = {key.removeprefix(f"{name}."): part for key, part in headers.items() if key.startswith(f"{name}.")}
            shape, dtype = _stated(folder / info.file, state, headers[state], info, read)
            found[name] = PackedMatrix(shape, dtype, info.file, info.begin, info, parts)
            beside |= {f"{name}.{key}" for key in parts}
        elif info.dtype == "I8" and name != stem and stem + _SCALES in headers:
            part = headers[stem + _SCALES]
            if len(info.shape) != 2 or math.prod(part.shape) != info.shape[0]:  # kernels take it for granted
                raise UserError(
                    f"{folder / info.file}: {in_one_line(name, 120)} of shape {list(info.shape)} in 8 bits has "
                    f"{math.prod(part.shape)} scales, which do not fit a matrix with one for each row; {AGAIN}"
                )
            found[name] = PackedMatrix(info.shape, "F32", info.file, info.begin, info, {_SCALES: part})
            beside |= {stem + _SCALES, stem + _FORMAT}
        else:
            found[name] = info
    return {name: info for name, info in found.items() if name not in beside}


def _stated(
    file: Path, name: str, stated: TensorInfo, codes: TensorInfo, read: Callable[[TensorInfo], Tensor]
) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a matrix, from what is stated beside its codes."""
    where = f"{file}: {in_one_line(name, 120)}"
    if stated.dtype != "U8" or math.prod(stated.shape) > _LIMIT:
        raise UserError(f"{where} is no short text; {AGAIN}")
    state: Any = parse_json(bytes(read(stated).flatten().tolist()), where)
    check_shape(state, _SHAPE, where, AGAIN)
    shape, dtype = state.get("shape") or [], _NAMES.get(str(state.get("dtype")))
    size = math.prod(codes.shape) * STORED_DTYPES[codes.dtype].itemsize
    if dtype is None or len(shape) != 2 or min(shape) < 1 or -(-math.prod(shape) // 2) != size:
        raise UserError(f"{where} states no dtype, or no shape of a matrix of {size} bytes of 4 bits; {AGAIN}")
    return tuple(shape), dtype


def matrix_of(info: PackedMatrix, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """The numbers of a packed matrix, on the host."""
    from bitsandbytes import functional

    codes, parts = read(info.codes), {name: read(part) for name, part in info.parts.items()}
    if _SCALES in parts:
        return functional.int8_vectorwise_dequant(codes, parts[_SCALES].float())
    return four_bits_unpacked(codes, functional.QuantState.from_dict(parts, torch.device("cpu")))
