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

import torch
from torch import Tensor

from heretic_ds.errors import UserError
from heretic_ds.model_source import TensorInfo

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
"""Size of the buffer through which short pieces are read."""
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
        """`headers` as :func:`heretic_ds.model_source.read_headers` gives them, already checked."""
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

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """The part [start, stop) along `dim` of one tensor, in its dtype, on the host."""
        shape, place = self.shapes[name], self._places[name]
        if not shape:
            return self._bytes(place, 0, place.dtype.itemsize).view(place.dtype).reshape(())
        stop = shape[dim] if stop is None else stop
        wanted = (*shape[:dim], stop - start, *shape[dim + 1 :])
        item = math.prod(shape[dim + 1 :]) * place.dtype.itemsize  # bytes of one index along `dim`
        outer, row, run = math.prod(shape[:dim]), shape[dim] * item, (stop - start) * item
        if outer == 1:
            data = self._bytes(place, start * item, run)
        elif run >= _SHORT_BYTES:
            data = torch.empty(outer * run, dtype=torch.uint8)
            for i in range(outer):
                self._read_into(place, i * row + start * item, data[i * run : (i + 1) * run])
        else:
            data = self._short_runs(place, outer, row, start * item, run)
        return data.view(place.dtype).reshape(wanted)

    def _short_runs(self, place: _Place, outer: int, row: int, offset: int, run: int) -> Tensor:
        """`run` bytes at `offset` of each of `outer` rows, read by many whole rows at a time."""
        data = torch.empty(outer, run, dtype=torch.uint8)
        rows = max(1, _BUFFER_BYTES // row)
        buffer = torch.empty(min(rows, outer), row, dtype=torch.uint8)
        for first in range(0, outer, rows):
            count = min(rows, outer - first)
            self._read_into(place, first * row, buffer[:count].view(-1))
            data[first : first + count] = buffer[:count, offset : offset + run]
        return data.view(-1)

    def _bytes(self, place: _Place, offset: int, size: int) -> Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        self._read_into(place, offset, data)
        return data

    def _read_into(self, place: _Place, offset: int, data: Tensor) -> None:
        if place.file not in self._open:
            self._open[place.file] = FileIO(place.file)
        file, view, done = self._open[place.file], memoryview(data.numpy()), 0
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
