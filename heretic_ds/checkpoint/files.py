"""Parts of tensors out of safetensors files, read and not mapped.

Pages of a mapped file count as a process's memory for as long as the map lives, and a few columns of a matrix touch
all of its pages: a rank that maps the files holds the whole checkpoint for a while. Reads into a buffer cost what is
kept, plus one small buffer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from heretic_ds.checkpoint.source import TensorInfo
from heretic_ds.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_BUFFER_BYTES = 32 * 2**20
"""Size of the buffer through which goes what cannot be read where it belongs."""
_SHORT_BYTES = 64 * 2**10
"""Pieces below this size are read with what lies between them: a system call costs more than copying that much."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its file."""

    file: Path
    begin: int
    dtype: torch.dtype


class TensorFiles:
    """The tensors of a checkpoint by name, with shapes known and contents on disk."""

    def __init__(self, folder: Path, headers: Mapping[str, TensorInfo]) -> None:
        """`headers` as :func:`heretic_ds.checkpoint.source.read_headers` gives them, already checked."""
        if not headers:
            raise UserError(
                f"{folder} has no safetensors weights, of which each rank could read its part; convert the model "
                "(load it with transformers and save it again), or set evaluate=replicated"
            )
        self.shapes = {name: info.shape for name, info in headers.items()}
        self._places: dict[str, _Place] = {}
        for file in sorted({info.file for info in headers.values()}):
            self._places.update(_places(folder / file))
        self._open: dict[Path, FileIO] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        """One whole tensor, in its dtype, on the host."""
        whole = torch.empty(self.shapes[name], dtype=self._places[name].dtype)
        self.read_into(name, whole)
        return whole

    def read_into(self, name: str, target: Tensor, dim: int = 0, start: int = 0, stop: int | None = None) -> None:
        """Copy the part [start, stop) along `dim` of one tensor to `target`, in the dtype and on the device it has."""
        shape = self.shapes[name]
        if not shape:
            shape, target = (1,), target.reshape(1)
        stop = shape[dim] if stop is None else stop
        self._copy(self._places[name], 0, shape, dim, range(start, stop), target)

    def _copy(
        self, place: _Place, offset: int, shape: tuple[int, ...], dim: int, wanted: range, target: Tensor
    ) -> None:
        """Copy indices `wanted` along `dim` of the block of this shape that starts at byte `offset`."""
        size = place.dtype.itemsize
        if dim == 0:
            item = math.prod(shape[1:]) * size
            self._rows(place, offset + wanted.start * item, shape[1:], target)
            return
        row, run = math.prod(shape[1:]) * size, len(wanted) * math.prod(shape[2:]) * size
        if dim == 1 and run < _SHORT_BYTES:
            self._short_runs(place, offset, shape, wanted, target)
            return
        for i in range(shape[0]):
            self._copy(place, offset + i * row, shape[1:], dim - 1, wanted, target[i])

    def _rows(self, place: _Place, offset: int, rest: tuple[int, ...], target: Tensor) -> None:
        """Fill `target` with rows of shape `rest` that follow one another in the file."""
        direct = target.is_contiguous() and target.numel() > 1  # one number counts as contiguous whatever its stride
        if direct and target.dtype == place.dtype and target.device.type == "cpu":
            self._read(place, offset, target.view(-1).view(torch.uint8))
            return
        item = math.prod(rest) * place.dtype.itemsize
        at_once = max(1, _BUFFER_BYTES // max(item, 1))
        for first in range(0, len(target), at_once):
            count = min(at_once, len(target) - first)
            rows = self._buffered(place, offset + first * item, count * item)
            target[first : first + count].copy_(rows.view(count, *rest))

    def _short_runs(self, place: _Place, offset: int, shape: tuple[int, ...], wanted: range, target: Tensor) -> None:
        """Indices `wanted` of dimension 1 out of rows that are read whole, many at a time."""
        row = math.prod(shape[1:]) * place.dtype.itemsize
        at_once = max(1, _BUFFER_BYTES // max(row, 1))
        for first in range(0, shape[0], at_once):
            count = min(at_once, shape[0] - first)
            rows = self._buffered(place, offset + first * row, count * row).view(count, *shape[1:])
            target[first : first + count].copy_(rows[:, wanted.start : wanted.stop])

    def _buffered(self, place: _Place, offset: int, size: int) -> Tensor:
        """`size` bytes of the file in its dtype, in a buffer that the next call overwrites: always the same memory, for
        allocations between those that stay would leave holes of their size."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, _BUFFER_BYTES), dtype=torch.uint8)
        self._read(place, offset, self._buffer[:size])
        return self._buffer[:size].view(place.dtype)

    def _read(self, place: _Place, offset: int, data: Tensor) -> None:
        if place.file not in self._open:
            self._open[place.file] = FileIO(place.file)
        file, view, done = self._open[place.file], memoryview(cast(Any, data.numpy())), 0
        file.seek(place.begin + offset)
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise UserError(f"{place.file} ends too early; download or copy it again")
            done += count


def _places(file: Path) -> dict[str, _Place]:
    """Where each tensor lies, by the file's header: 8 bytes of length, JSON, then the data."""
    with file.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
        header = json.loads(start.read(size))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise UserError(f"{file} holds tensors of dtype {unknown[0]}; expected one of {', '.join(_DTYPES)}")
    return {
        name: _Place(file, 8 + size + entry["data_offsets"][0], _DTYPES[entry["dtype"]])
        for name, entry in header.items()
    }
