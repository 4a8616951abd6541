"""Writes safetensors files tensor by tensor: the library's own function wants all of a file's tensors in memory.

A file is eight bytes with the size of its header (little endian), the header in JSON, padded with spaces to a multiple
of eight bytes, and the tensors' numbers without gaps. Tensors lie as the library puts them, so that files are the same,
byte for byte: by dtype, those of the widest numbers first, and by name within one dtype.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from heretic_ds.checkpoint.source import STORED_DTYPES

_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""The library's own, from first to last."""
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorForm:
    """A tensor to be written, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    file: Path,
    forms: Mapping[str, TensorForm],
    parts: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file with the tensors of these names and forms; afterwards it is on disk, not in a cache alone.

    ``parts`` gives the numbers of one tensor as pieces of any shape, on the host, contiguous and in its dtype, in the
    order in which they lie in memory. Each is written before the next is asked for. Raises OSError where the disk does
    not take them, RuntimeError where the pieces do not make up their tensor.
    """
    names = sorted(forms, key=lambda name: (_ORDER.index(_NAMES[forms[name].dtype]), name))
    with file.open("xb") as out:
        out.write(_header(names, forms, metadata or {}))
        for name in names:
            written = sum(_write(out, part, forms[name].dtype) for part in parts(name))
            if written != forms[name].size:
                raise RuntimeError(f"{name} takes {forms[name].size} bytes, but {written} were given")
        out.flush()
        os.fsync(out.fileno())


def _header(names: Iterable[str], forms: Mapping[str, TensorForm], metadata: Mapping[str, str]) -> bytes:
    """What comes before the numbers, its own size included."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        form = forms[name]
        place = [offset, offset + form.size]
        entries[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": place}
        offset += form.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(out: IO[bytes], part: Tensor, dtype: torch.dtype) -> int:
    """Write a piece, and tell its bytes."""
    if part.dtype != dtype:
        raise RuntimeError(f"a piece of a tensor in {dtype} is in {part.dtype}")
    if part.numel():
        out.write(part.reshape(-1).view(torch.uint8).numpy().data)
    return part.nbytes
