"""Numbers of packed tensors: any part of one, from the codes and scales of that part alone.

A number is its code times its scale, in float32, rounded once to the dtype that is asked for: bit for bit what
transformers makes of the whole tensor. (It makes MXFP4 in bfloat16 first. That changes nothing: four-bit numbers times
powers of two are exact there.) Codes: OCP Microscaling Formats (MX) 1.0, and OCP 8-bit Floating Point 1.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from heretic_ds.checkpoint.packed.headers import PackedInfo
from heretic_ds.checkpoint.source import STORED_DTYPES, TensorInfo

_AT_ONCE = 2**19
"""Numbers that are unpacked together: what is written for one step is in the processor's cache for the next."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the highest is the sign."""


class ReadBytes(Protocol):
    """Reads bytes of a file's tensor."""

    def __call__(self, info: TensorInfo, width: int, rows: range, columns: range, into: Tensor) -> None:
        """Copy a box of the tensor's bytes, taken as rows of ``width``, to ``into``, uint8 on the host."""


class Unpacking:
    """Reads parts of packed tensors, in memory that the next part uses again: what is kept would lie between holes."""

    def __init__(self, read: ReadBytes) -> None:
        self._read = read
        self._codes = torch.empty(0, dtype=torch.uint8)
        self._spaces: dict[torch.device, Tensor] = {}

    def read_into(self, info: PackedInfo, target: Tensor, dim: int, wanted: range) -> None:
        """Copy indices ``wanted`` along ``dim`` to ``target``, in the dtype and on the device it has."""
        ranges = [range(size) for size in info.shape]
        ranges[dim] = wanted
        *lead, rows, columns = ranges
        for place in product(*(range(len(each)) for each in lead)):
            number = 0
            for each, at, size in zip(lead, place, info.shape, strict=False):
                number = number * size + each[at]
            self._matrix(info, number, rows, columns, target[place])

    def read_numbers_into(self, info: PackedInfo, target: Tensor, start: int) -> None:
        """Copy numbers of the tensor as one row, from its number ``start`` on, to the row ``target``."""
        height, width = info.shape[-2:]
        done = 0
        while done < len(target):
            row, column = divmod(start + done, width)
            number, row = divmod(row, height)
            left = len(target) - done
            whole = 0 if column else min(left // width, height - row)
            columns = range(width) if whole else range(column, min(width, column + left))
            rows = range(row, row + (whole or 1))
            count = len(rows) * len(columns)
            self._matrix(info, number, rows, columns, target[done : done + count].view(len(rows), len(columns)))
            done += count

    def _matrix(self, info: PackedInfo, number: int, rows: range, columns: range, target: Tensor) -> None:
        """A box of one matrix, as the tensor has it."""
        if info.turned:
            rows, columns, target = columns, rows, target.T
        if not rows or not columns:
            return
        for part in _parts(rows, info.block[0], max(1, _AT_ONCE // len(columns))):
            numbers = self._numbers(info, number, part, columns, target.device)
            numbers *= self._scales(info, number, part, columns, target.device)
            target[part.start - rows.start : part.stop - rows.start].copy_(numbers)

    def _numbers(self, info: PackedInfo, number: int, rows: range, columns: range, device: torch.device) -> Tensor:
        """What codes mean without their scales, float32, in memory that the next call overwrites."""
        height, width = info.stored_shape
        inside = range(number * height + rows.start, number * height + rows.stop)
        count = len(rows) * len(columns)
        if info.four_bits:
            first, last = columns.start // 2, -(-columns.stop // 2)
            pairs = self._bytes(info.codes, width // 2, inside, range(first, last)).to(device)
            start = columns.start - 2 * first
            meant = _fp4_pairs(device)[pairs.int()].view(torch.bfloat16)[:, start : start + len(columns)]
        else:
            dtype = STORED_DTYPES[info.codes.dtype]
            size = dtype.itemsize
            wanted = range(size * columns.start, size * columns.stop)
            meant = self._bytes(info.codes, size * width, inside, wanted).to(device).view(dtype)
        return self._space(device, count).view(len(rows), len(columns)).copy_(meant)

    def _scales(self, info: PackedInfo, number: int, rows: range, columns: range, device: torch.device) -> Tensor:
        """Scales of a box that lies in one row of blocks, or whose rows are one each: [1 or rows, 1 or columns]."""
        (height, width), (block_rows, block_columns) = info.stored_shape, info.block
        dtype, across = STORED_DTYPES[info.scales.dtype], -(-width // block_columns)
        number = 0 if math.prod(info.scales.shape) == 1 else number
        above = number * -(-height // block_rows)
        down = range(above + rows.start // block_rows, above + (rows.stop - 1) // block_rows + 1)
        along = range(columns.start // block_columns, (columns.stop - 1) // block_columns + 1)
        stored = torch.empty(len(down), len(along) * dtype.itemsize, dtype=torch.uint8)
        wanted = range(dtype.itemsize * along.start, dtype.itemsize * along.stop)
        self._read(info.scales, dtype.itemsize * across, down, wanted, stored)
        scales = stored.to(device)
        scales = _powers(device)[scales.int()] if dtype == torch.uint8 else scales.view(dtype).float()
        if len(along) == 1:
            return scales
        begin = columns.start - along.start * block_columns
        repeated = scales[:, :, None].expand(-1, -1, block_columns).reshape(len(down), -1)
        return repeated[:, begin : begin + len(columns)]

    def _bytes(self, info: TensorInfo, width: int, rows: range, columns: range) -> Tensor:
        """A box of a tensor's bytes, in memory that the next call overwrites."""
        count = len(rows) * len(columns)
        if self._codes.numel() < count:
            self._codes = torch.empty(max(count, _AT_ONCE), dtype=torch.uint8)
        box = self._codes[:count].view(len(rows), len(columns))
        self._read(info, width, rows, columns, box)
        return box

    def _space(self, device: torch.device, count: int) -> Tensor:
        space = self._spaces.get(device)
        if space is None or space.numel() < count:
            space = self._spaces[device] = torch.empty(max(count, _AT_ONCE), device=device)
        return space[:count]


def _parts(rows: range, block: int, most: int) -> Iterator[range]:
    """Rows in runs of at most so many, each in one row of blocks; where blocks have one row, in as few as can be."""
    start = rows.start
    while start < rows.stop:
        stop = min(start + most, rows.stop)
        if block > 1:
            stop = min(stop, (start // block + 1) * block)
        yield range(start, stop)
        start = stop


@cache
def _fp4_pairs(device: torch.device) -> Tensor:
    """[256] by byte: the two numbers that its codes mean, in bfloat16, the lower code's first, seen as one int32."""
    both = torch.tensor([*_FP4, *(-number for number in _FP4)], dtype=torch.bfloat16)
    code = torch.arange(256)
    return torch.stack([both[code & 15], both[code >> 4]], dim=-1).view(torch.int32).view(-1).to(device)


@cache
def _powers(device: torch.device) -> Tensor:
    """[256] by byte: two to the power of the byte less 127; the last byte stands for no number (E8M0)."""
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
    powers[255] = math.nan
    return powers.to(device)
