"""The headers that a packed checkpoint would have if it were not: each pair of codes and scales is one tensor.

Which tensor goes with which scales, and how many numbers share one, is told by names and shapes as transformers tells
it. Only one thing is otherwise: where blocks do not divide a matrix, the last ones are smaller, as whoever packed it
had them. transformers refuses such a matrix, or takes all blocks for equally large if their number divides it. Where
no size is stated, blocks are of the usual size if that gives as many as there are, else equally large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heretic_ds.checkpoint.source import CONFIG_NAME, STORED_DTYPES, TensorInfo
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import AGAIN
from heretic_ds.foreign.text import in_one_line

METHODS = ("fp8", "mxfp4")
"""Ways of packing that are read here, by their names in configurations."""

_SCALE, _SHORT_SCALE, _UNREAD = "_scale_inv", ".scale", (".activation_scale", ".input_scale")
"""Ends of names: a tensor's scales, the same where it is a ``.weight``, and scales of what layers are given."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_USUAL = (128, 128)
"""Rows and columns of blocks where a configuration states none: what transformers packs in, and DeepSeek-V3."""
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""Dtypes of scales; the last holds exponents, from 127 below."""


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """A tensor of two or more dimensions whose numbers lie in a file as codes, beside their scales.

    ``shape`` is that of its numbers; ``dtype`` the one that such a tensor usually has where it is not packed; ``file``
    and ``begin`` are those of the codes.
    """

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    """Rows and columns of each matrix, as it lies in the file, that have one scale; the last may have fewer."""
    four_bits: bool = False
    """Whether a byte holds two codes, the lower one first."""
    turned: bool = False
    """Whether matrices lie transposed in the file."""

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns of each matrix as it lies in the file."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.turned else (rows, columns)


def unpacked_headers(
    raw: Mapping[str, Any], headers: Mapping[str, TensorInfo], folder: Path
) -> Mapping[str, TensorInfo]:
    """Headers of a checkpoint as they would be if it were not packed; as they are where it is not, or otherwise.

    ``raw`` is its configuration, checked, ``folder`` where it lies. Raises UserError where scales are lacking, or do
    not fit what they belong to.
    """
    parts = (raw, raw.get("text_config") or {})
    stated: Mapping[str, Any] = next(
        (part["quantization_config"] for part in parts if part.get("quantization_config")), {}
    )
    method = stated.get("quant_method")
    if method == "mxfp4":
        return _mxfp4(headers, folder)
    return _fp8(headers, folder, _stated_block(stated, folder)) if method == "fp8" else headers


def _mxfp4(headers: Mapping[str, TensorInfo], folder: Path) -> dict[str, TensorInfo]:
    """``X_blocks`` [E, D, G, 16] and ``X_scales`` [E, D, G] are the experts X [E, 32 G, D], which lie transposed."""
    found: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        stem = name.removesuffix("_blocks")
        if stem == name:
            if f"{name.removesuffix('_scales')}_blocks" not in headers:
                found[name] = info
            continue
        scales = headers.get(f"{stem}_scales")
        if scales is None:
            raise _lacking(folder, name, info, f"{stem}_scales")
        if len(info.shape) != 4 or info.dtype != "U8" or scales.shape != info.shape[:-1] or scales.dtype != "U8":
            raise _unfit(folder, f"{stem}_scales", scales, name, info)
        experts, rows, groups, size = info.shape
        shape = (experts, 2 * size * groups, rows)
        found[stem] = PackedInfo(
            shape, "BF16", info.file, info.begin, info, scales, (1, 2 * size), four_bits=True, turned=True
        )
    return found


def _fp8(headers: Mapping[str, TensorInfo], folder: Path, stated: tuple[int, int] | None) -> dict[str, TensorInfo]:
    """``X`` and ``X_scale_inv`` are the tensor X; for an ``X.weight`` scales may be called ``X.scale``."""
    scales: dict[str, str] = {}
    for name in headers:
        owner = name.removesuffix(_SCALE)
        if name.endswith(_SHORT_SCALE):
            owner = f"{name.removesuffix(_SHORT_SCALE)}.weight"
            if owner not in headers or headers[owner].dtype not in (*_FP8, "I8"):
                continue
        if owner != name and owner in headers:
            scales[owner] = name
    used = set(scales.values())
    found: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        if name in scales:
            found[name] = _fp8_tensor(folder, name, info, scales[name], headers[scales[name]], stated)
        elif info.dtype in _FP8:
            raise _lacking(folder, name, info, name + _SCALE)
        elif name not in used and not name.endswith(_UNREAD):
            found[name] = info
    return found


def _fp8_tensor(
    folder: Path, name: str, info: TensorInfo, scales_name: str, scales: TensorInfo, stated: tuple[int, int] | None
) -> PackedInfo:
    four_bits = info.dtype == "I8"  # experts of some are in FP4, two numbers a byte
    fits = len(info.shape) >= 2 and scales.dtype in _SCALES and info.dtype in (*_FP8, "I8", "BF16", "F16", "F32")
    block = None
    if fits:
        shape = (*info.shape[:-1], info.shape[-1] * 2) if four_bits else info.shape
        block = _block(shape, scales.shape, stated)
    if block is None:
        raise _unfit(folder, scales_name, scales, name, info, sizes_left_open=fits and stated is None)
    return PackedInfo(shape, "BF16", info.file, info.begin, info, scales, block, four_bits)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that have one scale, from the shapes of a tensor and its scales; None where they do not fit.

    ``stated`` is what the configuration says of all, from which experts may differ: there each row has scales of its
    own. Where it says nothing, 192 rows with two scales are blocks of 128 and 64, as they are usually made, not of 96.
    """
    rows, columns = shape[-2:]
    if math.prod(scales) == 1:
        return max(rows, 1), max(columns, 1)
    if len(scales) != len(shape) or scales[:-2] != shape[:-2] or not all(scales):
        return None
    grid, size = scales[-2:], stated or _USUAL
    if grid == (-(-rows // size[0]), -(-columns // size[1])):
        return size
    if rows % grid[0] or columns % grid[1] or (stated is not None and grid[0] != rows):
        return None
    return rows // grid[0], columns // grid[1]


def _stated_block(stated: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """The size of blocks that a configuration states. Raises UserError where that is no size."""
    size = stated.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise UserError(
            f"{folder / CONFIG_NAME}: weight_block_size is {in_one_line(repr(size), 60)}; expected two whole numbers "
            f"from 1 on; {AGAIN}"
        )
    return size[0], size[1]


def _lacking(folder: Path, name: str, info: TensorInfo, scales: str) -> UserError:
    return UserError(
        f"{folder / info.file} holds {in_one_line(name, 120)} in {info.dtype}, but no file holds its scales "
        f"({in_one_line(scales, 120)}); {AGAIN}"
    )


def _unfit(
    folder: Path, scales_name: str, scales: TensorInfo, name: str, info: TensorInfo, sizes_left_open: bool = False
) -> UserError:
    tried = ", in blocks of 128 by 128 or equal ones, where no weight_block_size is stated" if sizes_left_open else ""
    return UserError(
        f"{folder / scales.file}: {in_one_line(scales_name, 120)} {list(scales.shape)} in {scales.dtype} cannot be the "
        f"scales of {in_one_line(name, 120)} {list(info.shape)} in {info.dtype}{tried}; {AGAIN}"
    )


def stored_bytes(headers: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensors as they lie in files, packed ones as codes and scales; of unknown dtypes none."""
    parts = [
        part
        for info in headers.values()
        for part in ((info.codes, info.scales) if isinstance(info, PackedInfo) else (info,))
    ]
    return sum(math.prod(p.shape) * STORED_DTYPES[p.dtype].itemsize for p in parts if p.dtype in STORED_DTYPES)
