"""Writes the whole edited model as a Hugging Face checkpoint, in the form of the one it was made from."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds import progress
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import (
    CARD_NAME,
    CODE_FILES,
    CONFIG_NAME,
    GENERATION_NAME,
    LICENCE_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    TensorInfo,
    read_headers,
)
from heretic_ds.edits.adapters import Adapter
from heretic_ds.export.adapter import ADAPTER_FOLDER, write_adapter
from heretic_ds.export.carried import add_carried, carried_tensors
from heretic_ds.export.manifest import public_model_name
from heretic_ds.export.reproduce import file_digests, write_directions
from heretic_ds.export.streaming import EditedFiles
from heretic_ds.export.target import MANIFEST_NAME, check_export_target, failures_named, replaced_folder
from heretic_ds.foreign.reading import path_of, read_json
from heretic_ds.needs import without_deepspeed
from heretic_ds.world import World

log = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_ONE_RANK = World()


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    folder: Path
    tensors: int
    weight_bytes: int
    carried: tuple[str, ...]
    """Tensors of the original checkpoint that are no part of the model, and were copied as they are."""


@dataclass(frozen=True)
class Beside:
    """What is written with the weights, and how."""

    adapter: Adapter | None = None
    """Does the same as the edit."""
    max_shard_size: str | None = None
    """Largest size of a weight file; None: :data:`SHARD_SIZE`."""
    directions: Tensor | None = None
    """The directions that the edit refers to, kept for :mod:`heretic_ds.export.reproduce`."""


_NOTHING = Beside()


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; tied ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def export_model(
    loaded: LoadedModel,
    target: Path | str,
    card: str,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    weights: EditedFiles | None = None,
    world: World = _ONE_RANK,
    beside: Beside = _NOTHING,
) -> ExportResult:
    """Write `loaded.model` with its tokenizer, configurations, `card` and `manifest` to the folder `target`.

    Weights are written under the names of the original checkpoint, in the dtype they have in memory.
    Tokenizer, processor, generation configuration, licence and code files are copies of the original's. All
    of it appears at once: until the last file is on disk, `target` stays as it was. Raises UserError as
    `check_export_target` does.

    `weights` are written instead, by all ranks, for a model whose weights are not in memory; all else is rank 0's work.
    Every rank of `world` calls this, and an error on one of them is raised on all.
    """
    size = model_bytes(loaded.model)
    target = path_of(str(target), "export.dir").resolve()
    with ExitStack() as unfinished:

        def begin() -> str:
            check_export_target(target, overwrite, source=loaded.source, needed_bytes=size)
            with failures_named(target):
                return str(unfinished.enter_context(replaced_folder(target)))

        def save() -> None:
            with failures_named(target):
                largest = beside.max_shard_size or SHARD_SIZE
                with without_deepspeed():
                    loaded.model.save_pretrained(folder, max_shard_size=largest)
                _check_complete(loaded.model, read_headers(folder))
                add_carried(loaded, folder, largest)

        def finish() -> ExportResult:
            with failures_named(target):
                if beside.adapter is not None:
                    write_adapter(folder / ADAPTER_FOLDER, beside.adapter, loaded.model, public_model_name(loaded))
                tensors, carried = _complete(loaded, folder)
                _describe(folder, card, {**manifest, "carried": list(carried)}, beside)
                unfinished.close()  # here, for the other ranks to learn of an error of it
            return ExportResult(target, tensors, size, carried)

        folder = Path(world.decide(begin))
        with progress.work("files", size, "bytes", measure=lambda: _bytes_in(folder)):
            if weights is None:
                world.decide(save, "writing the model")
            else:
                weights.write(world, folder, target)
        result = world.decide(finish, "finishing the model")
    if result.carried:
        log.info(
            "%d tensors of the original are no part of the model, and were copied as they are", len(result.carried)
        )
    return result


def export_adapter(
    loaded: LoadedModel,
    target: Path | str,
    card: str,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    world: World = _ONE_RANK,
    beside: Beside = _NOTHING,
) -> ExportResult:
    """Write `beside.adapter` alone to the folder `target`, with `card`, `manifest` and the original's licence, all at
    once. Rank 0's work, which alone needs the adapter; every rank of `world` calls this. Raises UserError as
    `check_export_target` does.
    """
    target = path_of(str(target), "export.dir").resolve()

    def write() -> ExportResult:
        adapter = beside.adapter
        if adapter is None:
            raise RuntimeError("rank 0 has no adapter to write")
        size = adapter.bytes
        check_export_target(target, overwrite, source=loaded.source, needed_bytes=size)
        with failures_named(target), replaced_folder(target) as folder:
            tensors = write_adapter(folder, adapter, loaded.model, public_model_name(loaded))
            _copy(loaded.source, folder, LICENCE_FILES)
            _describe(folder, card, manifest, beside)
        return ExportResult(target, tensors, size, ())

    return world.decide(write, "writing the adapter")


def _bytes_in(folder: Path) -> int:
    """Bytes of the files that lie in a folder by now."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())
    except OSError:  # a file was renamed meanwhile, or the folder is another machine's
        return 0


def _complete(loaded: LoadedModel, folder: Path) -> tuple[int, tuple[str, ...]]:
    """Write what a model's folder has beside weights. Returns the number of their tensors, and which of them are no
    part of the model."""
    if not (folder / CONFIG_NAME).exists():
        loaded.model.config.save_pretrained(folder)
    _write_configs(loaded, folder)
    _copy_companions(loaded, folder)
    return len(read_headers(folder)), tuple(carried_tensors(loaded))


def _describe(folder: Path, card: str, manifest: Mapping[str, Any], beside: Beside) -> None:
    """Write what tells of the rest: last the manifest, with a digest of every file but the card."""
    if beside.directions is not None:
        write_directions(folder, beside.directions)
    digests = file_digests(folder)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    _write_json(folder / MANIFEST_NAME, {**manifest, "files": digests})


def _write_configs(loaded: LoadedModel, folder: Path) -> None:
    """The original's own `config.json` and `generation_config.json`, where they describe the model written.

    transformers rewrites configurations in the layout of its own version, which older programs cannot read;
    the original's is read by whatever reads the original. Only dtype and quantisation are brought up to date.
    """
    original = loaded.source / CONFIG_NAME
    raw = read_json(original) if original.is_file() else {}
    if type(loaded.model).__name__ in raw.get("architectures", []):
        _write_json(folder / CONFIG_NAME, _updated_config(raw, str(loaded.dtype).removeprefix("torch.")))
    (folder / GENERATION_NAME).unlink(missing_ok=True)  # as loaded, it is set to greedy decoding
    if (loaded.source / GENERATION_NAME).is_file():
        shutil.copyfile(loaded.source / GENERATION_NAME, folder / GENERATION_NAME)


def _updated_config(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`raw` in the dtype written, unquantised, and without the folder it was once loaded from."""
    dropped = ("quantization_config", "_name_or_path")
    fresh = {key: value for key, value in raw.items() if key not in dropped}
    stated = [key for key in _DTYPE_KEYS if raw.get(key) is not None]
    fresh |= dict.fromkeys(stated, dtype)
    for key, part in fresh.items():
        if key.endswith("_config") and isinstance(part, dict):
            fresh[key] = _updated_config(part, dtype)
    if not stated and "model_type" in raw and "architectures" in raw:
        fresh["dtype"] = dtype
    return fresh


def _copy_companions(loaded: LoadedModel, folder: Path) -> None:
    """Copy the original's tokenizer, processor, licence and code files; from memory what it lacks."""
    for patterns, in_memory in ((TOKENIZER_FILES, loaded.tokenizer), (PROCESSOR_FILES, loaded.processor)):
        if not _copy(loaded.source, folder, patterns) and in_memory is not None:
            in_memory.save_pretrained(folder)
    _copy(loaded.source, folder, LICENCE_FILES + CODE_FILES)


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> int:
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    for file in files:
        place = folder / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    return len(files)


def warn_of_strays(source: Path) -> None:
    """Say, before a long search, which small files will be copied from outside the model's folder, to which links lead.

    Where the configuration leads the others may: so do the files of the hub's cache, and of a folder of links.
    """
    homes = {source.resolve(), (source / CONFIG_NAME).resolve().parent}
    patterns = TOKENIZER_FILES + PROCESSOR_FILES + LICENCE_FILES + CODE_FILES
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        place = file.resolve()
        if not homes & {*place.parents}:
            log.warning(
                "%s leads out of the model's folder, to %s, which will be copied into the edited model", file, place
            )


def _check_complete(model: PreTrainedModel, written: Mapping[str, TensorInfo]) -> None:
    """Refuse an export that lost tensors: names are converted on the way to disk, and two may fall on one."""
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    unique = {(tensor.data_ptr(), tensor.shape): tensor for tensor in kept.values()}
    expected = sum(tensor.numel() for tensor in unique.values())
    found = sum(math.prod(info.shape) for info in written.values())
    if found < expected:
        raise RuntimeError(f"only {found} of the model's {expected} numbers were written to the export")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
