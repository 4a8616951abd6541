"""Where a model's files come from, and what can be known about them before a single tensor is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open

from heretic_ds.checkpoint.downloads import fetched
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import FULL, writing
from heretic_ds.foreign.reading import AGAIN, MEBIBYTE, parse_json, path_of, read_json, reading, reason
from heretic_ds.foreign.text import in_one_line

CONFIG_NAME = "config.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What holds or lists the weights, in the order in which transformers looks for it."""

TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "tokenizer*.jinja",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
    "video_preprocessor_config.json",
    "feature_extractor*.json",
)
LICENCE_FILES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")
CODE_FILES = ("*.py",)
CARD_NAME = "README.md"
GENERATION_NAME = "generation_config.json"

_PICKLED = "pytorch_model"
_PICKLE_ADVICE = (
    "which may hold programs; convert them where you trust their author (AutoModelForCausalLM.from_pretrained(...)"
    ".save_pretrained(...) of transformers writes safetensors), or set model.allow_pickle=true."
)
_CONFIG_LIMIT = 16 * MEBIBYTE
_FILE_NAME = re.compile(r"(?!\.)[\w.+ -]{1,200}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this machine."""

    folder: Path
    """The folder the user named, or the cached snapshot of a hub model."""
    name: str
    """Hub id, or for a local folder its own name: never an absolute path."""
    revision: str | None
    """Commit of a hub model."""
    is_hub: bool
    """Whether the model comes from the hub."""


def is_hub_id(path: str) -> bool:
    """Whether `path` reads as a hub id (`name` or `owner/name`)."""
    return _HUB_ID.fullmatch(path) is not None


def local_folder(path: str) -> Path | None:
    """The folder that `path` names, None for a hub id; asks no hub. Raises UserError where it is neither."""
    local = path_of(path, "model.path")
    if local.is_dir():
        return local.resolve()
    if local.exists():
        raise UserError(f"model.path={path} is a file; expected a model's folder or a hub id.")
    if not is_hub_id(path):
        raise UserError(f"model.path={path}: there is no such folder; expected a model's folder or a hub id.")
    return None


def resolve_source(path: str, revision: str | None = None, allow_pickle: bool = False) -> ModelSource:
    """The folder of the model that `path` names: itself, or a hub model's snapshot, downloaded where missing.

    Of a hub model only the weights that transformers would load are fetched, not their duplicates in other
    formats; pickled ones only with ``allow_pickle``. Raises UserError where there is no such folder, or the hub does
    not give the model.
    """
    local = local_folder(path)
    if local is not None:
        return ModelSource(local, local.name, None, is_hub=False)
    folder = _fetch(path, revision, allow_pickle)
    return ModelSource(folder, path, folder.name, is_hub=True)


def outline_source(path: str, revision: str | None = None) -> tuple[ModelSource, dict[str, TensorInfo]]:
    """The folder of a model's configuration, and what its weights are as far as that can be known without them.

    Of a hub model no weights are fetched: the hub tells of their files' headers. Where neither has whole safetensors
    files the second is empty. Raises UserError as :func:`resolve_source` does.
    """
    local = local_folder(path)
    if local is not None:
        return ModelSource(local, local.name, None, is_hub=False), read_headers(local) if is_whole(local) else {}
    patterns = [CONFIG_NAME, GENERATION_NAME, *CODE_FILES]
    with _hub_errors(path, revision):
        folder = fetched(path, revision, patterns)
        headers = read_headers(folder) if is_whole(folder) else _headers_on_hub(path, folder.name)
    return ModelSource(folder, path, folder.name, is_hub=True), headers


def has_pickled_alone(source: ModelSource, headers: Mapping[str, TensorInfo]) -> bool:
    """Whether a model whose outline this is has weight files, none of them safetensors. Those of a local one may not be
    there; on the hub, what has no headers is no safetensors."""
    if headers or source.is_hub:
        return not headers
    found = [name for name in WEIGHT_FILES if (source.folder / name).is_file()]
    return bool(found) and found[0].startswith(_PICKLED)


def _headers_on_hub(name: str, commit: str) -> dict[str, TensorInfo]:
    try:
        files = get_safetensors_metadata(name, revision=commit).files_metadata
    except NotASafetensorsRepoError:
        return {}
    return {
        tensor: TensorInfo(tuple(info.shape), info.dtype, file, 0)
        for file, metadata in files.items()
        for tensor, info in metadata.tensors.items()
    }


def _fetch(name: str, revision: str | None, allow_pickle: bool) -> Path:
    small: tuple[str, ...] = (CONFIG_NAME, GENERATION_NAME, CARD_NAME, *WEIGHT_FILES[1::2])
    small += TOKENIZER_FILES + PROCESSOR_FILES + LICENCE_FILES + CODE_FILES
    with _hub_errors(name, revision):
        folder = fetched(name, revision, list(small))
        weights = _weights_to_fetch(folder)
        if weights[0].startswith(_PICKLED) and not allow_pickle:
            raise UserError(f"{name} has only pickled weights ({weights[0]}), {_PICKLE_ADVICE}")
        if not all((folder / file).exists() for file in weights):
            folder = fetched(name, folder.name, weights)
        lacking = not any((folder / file).exists() for file in WEIGHT_FILES) and (folder / CONFIG_NAME).exists()
        if lacking and allow_pickle:
            folder = fetched(name, folder.name, [WEIGHT_FILES[2]])
    return folder


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """While open, what goes wrong with the hub is a UserError."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"model.path={name} is gated: accept its terms on its hub page and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision={revision}: {name} has no such branch, tag or commit.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"model.path={name} is neither a folder here nor a model on the hub that this login can see."
        ) from error
    except UserError:
        raise
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            with writing(Path(HF_HUB_CACHE), "HF_HOME"):
                raise
        raise UserError(
            f"model.path={name} is not a folder here, is not cached, and the hub cannot be reached: "
            "check the name and the network, or set model.path to a local folder."
        ) from error
    except Exception as error:  # what the hub sends may be anything
        raise UserError(f"model.path={name} cannot be read from the hub: {reason(error)}; {AGAIN}") from error


def _weights_to_fetch(folder: Path) -> list[str]:
    """Shards that the index in `folder` lists, else the one file of an unsharded checkpoint."""
    index = next((folder / name for name in WEIGHT_FILES[1::2] if (folder / name).exists()), None)
    return sorted(set(_read_index(index).values())) if index else [WEIGHT_FILES[0]]


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json` of a model's folder; UserError where there is none."""
    file = folder / CONFIG_NAME
    if file.is_file():
        return read_json(file, limit=_CONFIG_LIMIT)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter, not a whole model; merge it into its base model first.")
    if next(folder.glob("*.gguf"), None):
        raise UserError(f"{folder} holds GGUF files; set model.path to the original Hugging Face checkpoint.")
    raise UserError(f"{folder} has no {CONFIG_NAME}; expected the folder of a Hugging Face model (model.path).")


def stated_quantization(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a raw configuration, checked or not, states of its quantisation; empty where it states nothing."""
    for part in (raw, raw.get("text_config")):
        stated = part.get("quantization_config") if isinstance(part, Mapping) else None
        if stated and isinstance(stated, Mapping):
            return stated
    return {}


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor. All of them lie beside the index: a name cannot lead elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lists no tensors under 'weight_map'; download or copy it again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise UserError(
                f"{index} gives {in_one_line(repr(file), 80)} as the file of {in_one_line(tensor, 80)}; expected the "
                "name of a file beside it; download or copy it again."
            )
    return weight_map


STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors files."""


@dataclass(frozen=True)
class TensorInfo:
    """A checkpoint tensor as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """One of :data:`STORED_DTYPES`, or one that only quantised checkpoints have."""
    file: str
    begin: int
    """The byte of the file at which its numbers begin."""


def read_headers(folder: Path, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of the folder's safetensors checkpoint by its name, read from the files' headers only.

    Checks each file's header against its size, and the index against the files. A checkpoint of pickled `.bin` files
    is refused, or with ``allow_pickle`` empty: their presence alone is checked. Raises UserError naming the file.
    """
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights; expected {WEIGHT_FILES[0]} or {WEIGHT_FILES[1]} in it.")
    if found.startswith(_PICKLED) and not allow_pickle:
        raise UserError(f"{folder} has only pickled weights ({found}), {_PICKLE_ADVICE}")
    weight_map = _read_index(folder / found) if found.endswith(".index.json") else {}
    shards = sorted(set(weight_map.values())) or [found]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"{folder / missing[0]} is missing: {len(missing)} of the {len(shards)} files that {found} lists "
            "are not there; download or copy the model again."
        )
    if found.startswith(_PICKLED):
        return {}
    headers: dict[str, TensorInfo] = {}
    for shard in shards:
        headers.update(_read_header(folder / shard))
    for tensor, shard in weight_map.items():
        if tensor not in headers or headers[tensor].file != shard:
            raise UserError(
                f"{folder / shard} has no tensor {tensor}, which {found} says it holds; "
                "download or copy the model again."
            )
    return headers


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all the safetensors files of a model, by their headers."""
    try:
        return bool(read_headers(folder))
    except UserError:
        return False


def _read_header(file: Path) -> dict[str, TensorInfo]:
    with reading(file), file.open("rb") as start:
        if start.read(26) == b"version https://git-lfs.gi":
            raise UserError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder.")
    with reading(file, found=f"is truncated or corrupt ({file.stat().st_size} bytes)"):
        safe_open(file, framework="pt")  # checks the header, its size, and the file's size against it
        with file.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
            entries = parse_json(start.read(size), file)
        return {
            name: TensorInfo(tuple(entry["shape"]), entry["dtype"], file.name, 8 + size + entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
