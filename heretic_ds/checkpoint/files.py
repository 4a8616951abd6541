"""Parts of tensors out of safetensors files, read and not mapped.

Pages of a mapped file count as a process's memory for as long as the map lives, and a few columns of a matrix touch
all of its pages: a rank that maps the files holds the whole checkpoint for a while. Reads into a buffer cost what is
kept, plus one small buffer. (Opening with `safe_open` anew for every 32 MiB takes as little, but parses the header each
time: 1 ms for 1,500 tensors, 17 ms for 20,000; and from a cold disk an eighth of all rows took 0.5 s instead of 0.2.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from heretic_ds.checkpoint.bnb.stored import PackedMatrix, matrix_of, unpacked_headers
from heretic_ds.checkpoint.packed import PackedInfo, Unpacking
from heretic_ds.checkpoint.source import STORED_DTYPES, TensorInfo
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import AGAIN, reading

_BUFFER_BYTES = 8 * 2**20
"""Size of the buffer through which goes what cannot be read where it belongs."""
_SHORT_BYTES = 64 * 2**10
"""Pieces below this size are read with what lies between them: a system call costs more than copying that much."""


def as_if_not_packed(folder: Path, headers: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """Headers of files in which bitsandbytes has packed matrices as they would be if it had not. Raises UserError."""
    return unpacked_headers(headers, folder, TensorFiles(folder, headers).stored) if headers else headers


class TensorFiles:
    """The tensors of a checkpoint by name, with shapes known and contents on disk.

    Packed ones are read as if they were not: their headers say so, see :mod:`heretic_ds.checkpoint.packed`.
    """

    def __init__(self, folder: Path, headers: Mapping[str, TensorInfo]) -> None:
        """`headers` as :func:`heretic_ds.checkpoint.source.read_headers` gives them, already checked, or
        :func:`heretic_ds.checkpoint.packed.unpacked_headers`, or :func:`as_if_not_packed`."""
        if not headers:
            raise UserError(
                f"{folder} has no safetensors weights, of which each rank could read its part; convert the model "
                "(load it with transformers and save it again), or set evaluate=replicated"
            )
        unknown = next((info for info in headers.values() if info.dtype not in STORED_DTYPES), None)
        if unknown is not None:
            known, file = ", ".join(STORED_DTYPES), folder / unknown.file
            raise UserError(f"{file} holds tensors of dtype {unknown.dtype}; expected one of {known}")
        self.shapes = {name: info.shape for name, info in headers.items()}
        self._folder, self._headers = folder, headers
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._unpacking = Unpacking(self._read_box)
        self._unpacked: tuple[PackedMatrix, Tensor] | None = None
        """The packed matrix that was read last."""
        self._kept_open: dict[str, IO[bytes]] = {}
        """Files of the packed tensor that is being read, by name."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, in its dtype, on the host; a packed one in float32, which holds it exactly."""
        info = self._headers[name]
        dtype = torch.float32 if isinstance(info, PackedInfo) else STORED_DTYPES[info.dtype]
        whole = torch.empty(self.shapes[name], dtype=dtype)
        self.read_into(name, whole)
        return whole

    def read_into(self, name: str, target: Tensor, dim: int = 0, start: int = 0, stop: int | None = None) -> None:
        """Copy the part [start, stop) along `dim` of one tensor to `target`, in the dtype and on the device it has."""
        info = self._headers[name]
        shape, target = (info.shape, target) if info.shape else ((1,), target.reshape(1))
        wanted = range(start, shape[dim] if stop is None else stop)
        if isinstance(info, PackedInfo):
            with self._keeping_open(info):
                self._unpacking.read_into(info, target, dim, wanted)
            return
        if isinstance(info, PackedMatrix):
            target.copy_(self._matrix(info).narrow(dim, wanted.start, len(wanted)))
            return
        with self._opened(info) as file:
            self._copy(file, info.begin, STORED_DTYPES[info.dtype], shape, dim, wanted, target)

    def read_numbers_into(self, name: str, target: Tensor, start: int = 0) -> None:
        """Copy numbers of one tensor, as one row from its number ``start`` on, to the row ``target``, as
        :meth:`read_into` does."""
        info = self._headers[name]
        if isinstance(info, PackedInfo):
            with self._keeping_open(info):
                self._unpacking.read_numbers_into(info, target, start)
            return
        wanted = range(start, start + len(target))
        if isinstance(info, PackedMatrix):
            target.copy_(self._matrix(info).view(-1)[start : wanted.stop])
            return
        with self._opened(info) as file:
            self._copy(file, info.begin, STORED_DTYPES[info.dtype], (math.prod(info.shape),), 0, wanted, target)

    def _read_box(self, info: TensorInfo, width: int, rows: range, columns: range, into: Tensor) -> None:
        """Copy a box of one tensor's bytes, taken as rows of ``width``, to ``into``, which is uint8 on the host."""
        offset, shape = info.begin + rows.start * width, (len(rows), width)
        whole, file = len(columns) == width, self._kept_open[info.file]
        dim, wanted = (0, range(len(rows))) if whole else (1, columns)
        self._copy(file, offset, torch.uint8, shape, dim, wanted, into)

    @contextmanager
    def _keeping_open(self, info: PackedInfo) -> Iterator[None]:
        """The files of a tensor's codes and scales stay open while the block lasts: a part of it takes many reads."""
        with ExitStack() as stack:
            stack.callback(self._kept_open.clear)
            for part in (info.codes, info.scales):
                if part.file not in self._kept_open:
                    self._kept_open[part.file] = stack.enter_context(self._opened(part))
            yield

    def stored(self, info: TensorInfo) -> Tensor:
        """One whole tensor as it lies in a file."""
        whole = torch.empty(info.shape, dtype=STORED_DTYPES[info.dtype])
        shape, target = (info.shape, whole) if info.shape else ((1,), whole.reshape(1))
        with self._opened(info) as file:
            self._copy(file, info.begin, whole.dtype, shape, 0, range(shape[0]), target)
        return whole

    def _matrix(self, info: PackedMatrix) -> Tensor:
        if self._unpacked is None or self._unpacked[0] is not info:
            self._unpacked = None  # before another takes its memory
            with reading(self._folder / info.file):
                self._unpacked = (info, matrix_of(info, self.stored).contiguous())
        return self._unpacked[1]

    def _opened(self, info: TensorInfo) -> IO[bytes]:
        path = self._folder / info.file
        with reading(path):
            return path.open("rb")

    def _copy(
        self,
        file: IO[bytes],
        offset: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        dim: int,
        wanted: range,
        target: Tensor,
    ) -> None:
        """Copy indices `wanted` along `dim` of the block of this shape that starts at byte `offset`."""
        row = math.prod(shape[1:]) * dtype.itemsize
        if dim > 1 or (dim == 1 and math.prod(target.shape[1:]) * dtype.itemsize >= _SHORT_BYTES):
            for i in range(shape[0]):
                self._copy(file, offset + i * row, dtype, shape[1:], dim - 1, wanted, target[i])
            return
        offset += wanted.start * row if dim == 0 else 0
        direct = target.is_contiguous() and target.numel() > 1  # one number counts as contiguous whatever its stride
        if dim == 0 and direct and target.dtype == dtype and target.device.type == "cpu":
            _read(file, offset, target.view(-1).view(torch.uint8))
            return
        at_once = max(1, _BUFFER_BYTES // max(row, 1))
        for first in range(0, len(target), at_once):
            count = min(at_once, len(target) - first)
            rows = self._buffered(file, offset + first * row, count * row).view(dtype).view(count, *shape[1:])
            target[first : first + count].copy_(rows if dim == 0 else rows[:, wanted.start : wanted.stop])

    def _buffered(self, file: IO[bytes], offset: int, size: int) -> Tensor:
        """`size` bytes of the file, in a buffer that the next call overwrites: always the same memory, for allocations
        between those that stay would leave holes of their size."""
        if self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, _BUFFER_BYTES), dtype=torch.uint8)
        _read(file, offset, self._buffer[:size])
        return self._buffer[:size]


def _read(file: IO[bytes], offset: int, data: Tensor) -> None:
    """Fill `data`, a row of bytes on the host, from where it lies in the file."""
    with reading(file.name):
        file.seek(offset)
        if cast(Any, file).readinto(data.numpy()) < data.numel():
            raise UserError(f"{file.name} ends too early; {AGAIN}")
