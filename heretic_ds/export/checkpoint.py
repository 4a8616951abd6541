"""Writes the whole edited model as a Hugging Face checkpoint, in the form of the one it was made from."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

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
    read_json,
)
from heretic_ds.edits.adapters import Adapter
from heretic_ds.export.adapter import ADAPTER_FOLDER, write_adapter
from heretic_ds.export.manifest import public_model_name
from heretic_ds.export.streaming import EditedFiles
from heretic_ds.export.target import MANIFEST_NAME, check_export_target, failures_named, replaced_folder
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
    left_behind: tuple[str, ...]
    """Tensors of the original checkpoint that the model does not use, and that the copy therefore lacks."""


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; tied ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def export_model(
    loaded: LoadedModel,
    target: Path | str,
    card: str,
    manifest: Mapping[str, Any],
    overwrite: bool = False,
    weights: EditedFiles | None = None,
    world: World = _ONE_RANK,
    adapter: Adapter | None = None,
) -> ExportResult:
    """Write `loaded.model` with its tokenizer, configurations, `card` and `manifest` to the folder `target`.

    Weights are written under the names of the original checkpoint, in the dtype they have in memory.
    Tokenizer, processor, generation configuration, licence and code files are copies of the original's. All
    of it appears at once: until the last file is on disk, `target` stays as it was. Raises UserError as
    `check_export_target` does.

    An `adapter` that does the same as the edit is written beside it, to a folder of its own.
    `weights` are written instead, by all ranks, for a model whose weights are not in memory; all else is rank 0's work.
    Every rank of `world` calls this, and an error on one of them is raised on all.
    """
    size = model_bytes(loaded.model)
    target = Path(target).expanduser().resolve()
    with ExitStack() as unfinished:

        def begin() -> str:
            check_export_target(target, overwrite, source=loaded.source, needed_bytes=size)
            with failures_named(target):
                return str(unfinished.enter_context(replaced_folder(target)))

        def save() -> None:
            with failures_named(target):
                loaded.model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
                _check_complete(loaded.model, read_headers(folder))

        def finish() -> ExportResult:
            with failures_named(target):
                tensors, left_behind = _complete(loaded, folder, card, manifest)
                if adapter is not None:
                    write_adapter(folder / ADAPTER_FOLDER, adapter, loaded.model, public_model_name(loaded))
                unfinished.close()  # here, for the other ranks to learn of an error of it
            return ExportResult(target, tensors, size, left_behind)

        folder = Path(world.decide(begin))
        if weights is None:
            world.decide(save, "writing the model")
        else:
            weights.write(world, folder, target)
        result = world.decide(finish, "finishing the model")
    if result.left_behind:
        log.warning("%d tensors of the original are not part of the model and were not copied", len(result.left_behind))
    return result


def export_adapter(
    loaded: LoadedModel,
    target: Path | str,
    card: str,
    manifest: Mapping[str, Any],
    overwrite: bool,
    adapter: Adapter | None,
    world: World = _ONE_RANK,
) -> ExportResult:
    """Write an adapter alone to the folder `target`, with `card`, `manifest` and the original's licence, all at once.

    Rank 0's work, which alone needs the adapter; every rank of `world` calls this. Raises UserError as
    `check_export_target` does.
    """
    target = Path(target).expanduser().resolve()

    def write() -> ExportResult:
        if adapter is None:
            raise RuntimeError("rank 0 has no adapter to write")
        size = adapter.bytes
        check_export_target(target, overwrite, source=loaded.source, needed_bytes=size)
        with failures_named(target), replaced_folder(target) as folder:
            tensors = write_adapter(folder, adapter, loaded.model, public_model_name(loaded))
            _copy(loaded.source, folder, LICENCE_FILES)
            (folder / CARD_NAME).write_text(card, encoding="utf-8")
            _write_json(folder / MANIFEST_NAME, manifest)
        return ExportResult(target, tensors, size, ())

    return world.decide(write, "writing the adapter")


def _complete(loaded: LoadedModel, folder: Path, card: str, manifest: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Write all that goes with weights. Returns their number, and what of the original is not among them."""
    if not (folder / CONFIG_NAME).exists():
        loaded.model.config.save_pretrained(folder)
    _write_configs(loaded, folder)
    _copy_companions(loaded, folder)
    written = read_headers(folder)
    left_behind = _left_behind(loaded, set(written))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    _write_json(folder / MANIFEST_NAME, {**manifest, "left_behind": list(left_behind)})
    return len(written), left_behind


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


def _check_complete(model: PreTrainedModel, written: Mapping[str, TensorInfo]) -> None:
    """Refuse an export that lost tensors: names are converted on the way to disk, and two may fall on one."""
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    unique = {(tensor.data_ptr(), tensor.shape): tensor for tensor in kept.values()}
    expected = sum(tensor.numel() for tensor in unique.values())
    found = sum(math.prod(info.shape) for info in written.values())
    if found < expected:
        raise RuntimeError(f"only {found} of the model's {expected} numbers were written to the export")


def _left_behind(loaded: LoadedModel, written: set[str]) -> tuple[str, ...]:
    """Names in the original's weight files that the copy lacks, but for tied and quantisation tensors."""
    if loaded.quantization is not None or not (loaded.source / CONFIG_NAME).is_file():
        return ()
    tied = set(getattr(loaded.model, "all_tied_weights_keys", {}))
    names = set(read_headers(loaded.source)) - written - tied
    return tuple(sorted(name for name in names if not name.endswith("rotary_emb.inv_freq")))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
