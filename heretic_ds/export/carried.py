"""Tensors of a checkpoint that transformers' model has no use for (heads that predict several tokens, say): copied from
file to file, so that programs which know them find them in the edited model too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from heretic_ds.checkpoint import TensorFiles
from heretic_ds.checkpoint.conversions import unused_tensors
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.packed import METHODS, unpacked_headers
from heretic_ds.checkpoint.source import (
    CONFIG_NAME,
    STORED_DTYPES,
    WEIGHT_FILES,
    TensorInfo,
    read_config,
    read_headers,
)
from heretic_ds.export.tensor_file import TensorForm, write_tensors
from heretic_ds.foreign.reading import read_json, reading

_AT_ONCE = 2**21
"""Numbers of a tensor that are copied."""
_RECOMPUTED = "rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints hold, and that no program reads."""


def carried_tensors(loaded: LoadedModel) -> dict[str, TensorInfo]:
    """What of the original's files is no part of the model, by name; packed tensors as if they were not. Of files that
    are quantised otherwise nothing can be told."""
    told = loaded.quantization is None or loaded.quantization in METHODS
    if not told or not (loaded.source / CONFIG_NAME).is_file():
        return {}
    found = read_headers(loaded.source, allow_pickle=True)  # those of pickled files are empty
    headers = unpacked_headers(read_config(loaded.source), found, loaded.source)
    unused = unused_tensors(loaded.model, {name: info.shape for name, info in headers.items()})
    return {name: headers[name] for name in sorted(unused) if not name.endswith(_RECOMPUTED)}


def add_carried(loaded: LoadedModel, folder: Path, max_shard_size: str) -> None:
    """Add them to the checkpoint in a folder, in files of their own, in the dtype of its weights."""
    carried = carried_tensors(loaded)
    if not carried:
        return
    forms = {name: TensorForm(info.shape, _dtype(info, loaded.dtype)) for name, info in carried.items()}
    split = split_state_dict_into_shards_factory(
        forms,
        get_storage_size=lambda form: form.size,
        filename_pattern="{suffix}",
        max_shard_size=max_shard_size,
    )
    written = read_headers(folder)
    old, new = sorted({info.file for info in written.values()}), list(split.filename_to_tensors.values())
    count = len(old) + len(new)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    renamed = dict(zip(old, names[: len(old)], strict=True))
    for before, after in reversed(renamed.items()):  # the last first: a name may be another's old one
        (folder / before).rename(folder / after)
    places = {name: renamed[info.file] for name, info in written.items()}
    tensors = TensorFiles(loaded.source, carried)
    for file, members in zip(names[len(old) :], new, strict=True):
        write_tensors(
            folder / file,
            {name: forms[name] for name in members},
            lambda name: copied(tensors, name, forms[name]),
            {"format": "pt"},
        )
        places |= dict.fromkeys(members, file)
    _write_index(folder, places)


def copied(tensors: TensorFiles, name: str, form: TensorForm) -> Iterator[Tensor]:
    """Some numbers of a tensor at a time, in the dtype they are to have, in memory that the next overwrite."""
    count, row = math.prod(form.shape), form.shape[-1] if form.shape else 1
    at_once = max(1, _AT_ONCE // max(row, 1)) * max(row, 1)  # whole rows, of which packed ones are read best
    buffer = torch.empty(min(count, at_once), dtype=form.dtype)
    for start in range(0, count, at_once):
        part = buffer[: count - start]
        tensors.read_numbers_into(name, part, start)
        yield part


def _dtype(info: TensorInfo, dtype: torch.dtype) -> torch.dtype:
    stored = STORED_DTYPES[info.dtype]
    return dtype if stored.is_floating_point else stored


def _write_index(folder: Path, places: Mapping[str, str]) -> None:
    """The index of all files; what an older one says beside sizes is kept."""
    file = folder / WEIGHT_FILES[1]
    metadata: dict[str, Any] = dict(read_json(file).get("metadata") or {}) if file.is_file() else {}
    file.unlink(missing_ok=True)
    size = sum((folder / name).stat().st_size for name in set(places.values()))
    metadata["total_size"] = size - sum(_header_size(folder / name) for name in set(places.values()))
    content = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _header_size(file: Path) -> int:
    with reading(file), file.open("rb") as start:
        return 8 + int.from_bytes(start.read(8), "little")
