"""What lets others make an export again: the directions that its edit refers to, how it was written, and a digest of
every file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heretic_ds.ablation import ROW_NORMS, Edit
from heretic_ds.checkpoint.source import CARD_NAME
from heretic_ds.errors import UserError
from heretic_ds.export.target import MANIFEST_NAME
from heretic_ds.foreign.reading import NOTHING, NUMBER, check_shape, read_json, reading
from heretic_ds.foreign.text import in_one_line
from heretic_ds.settings.export import SIZE

FOLDER, DIRECTIONS = "reproduce", "directions.safetensors"
_THREADS = 8
_NEEDED = ("base_model", "dtype", "edit", "row_norm", "through_norm", "format", "how", "files", "versions")
_SHAPE: dict[str, Any] = {
    "base_model": str,
    "revision": (str, NOTHING),
    "dtype": str,
    "edit": {"direction_index": (*NUMBER, NOTHING), "profiles": {str: {str: NUMBER}}},
    "row_norm": str,
    "through_norm": bool,
    "format": str,
    "how": {
        "device": str,
        "threads": int,
        "from_files": bool,
        "max_shard_size": (str, NOTHING),
        "adapter_rank": int,
    },
    "files": {str: str},
    "versions": {str: str},
}
"""Of a manifest: for :func:`heretic_ds.foreign.reading.check_shape`."""
_CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "row_norm": ROW_NORMS,
    "format": ("model", "adapter", "both"),
}
_MOST = 4096
"""Threads, and an adapter's rank."""
_AGAIN = "get it anew"


def write_directions(folder: Path, directions: Tensor) -> None:
    """Keep directions, as :attr:`heretic_ds.ablation.Ablation.stored` has them, in an export's folder."""
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file({"directions": directions.contiguous().cpu()}, folder / FOLDER / DIRECTIONS)


def how_written(
    device: torch.device, from_files: bool, max_shard_size: str | None, adapter_rank: int
) -> dict[str, Any]:
    """What the bits of an export depend on beside the edit and versions, for its manifest."""
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "from_files": from_files,
        "max_shard_size": max_shard_size,
        "adapter_rank": adapter_rank,
    }


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there, but for card and manifest, which bear a date."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in files if file not in (folder / CARD_NAME, folder / MANIFEST_NAME)]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def _digest(file: Path) -> str:
    with reading(file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@dataclass(frozen=True)
class Recipe:
    """An export's manifest and the directions beside it."""

    folder: Path
    manifest: dict[str, Any]
    directions: Tensor
    """Unit directions [L+1, D], or several orthonormal ones a layer, [L+1, R, D], float64."""

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From ``heretic_ds.json`` or the folder that holds it; weights need not be there. Raises UserError."""
        file = path / MANIFEST_NAME if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} is no {MANIFEST_NAME} of an export, nor a folder that holds one")
        manifest = read_json(file)
        how = manifest.get("how")
        missing = [key for key in _NEEDED if key not in manifest]
        missing += [f"how.{key}" for key in _SHAPE["how"] if isinstance(how, dict) and key not in how]
        if missing:
            raise UserError(
                f"{file} does not say {missing[0]!r}, as exports of this version do; export the model again"
            )
        check_shape(manifest, _SHAPE, str(file), _AGAIN)
        for key, value in _out_of_bounds(manifest):
            raise UserError(f"{file} has {in_one_line(str(value), 60)!r} as its {key}; {_AGAIN}")
        stored, name = file.parent / FOLDER / DIRECTIONS, f"{FOLDER}/{DIRECTIONS}"
        if not stored.is_file():
            raise UserError(f"{stored} is missing; get the folder {FOLDER} from where {file.name} is from")
        if _digest(stored) != manifest["files"].get(name):
            raise UserError(f"{stored} is not the file that {file.name} was written with; get both anew")
        with reading(stored, _AGAIN, "is damaged"):
            directions = load_file(stored)["directions"].double()
        with reading(file, _AGAIN):
            Edit.from_dict(manifest["edit"])
        return cls(file.parent, manifest, directions)


def _out_of_bounds(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What an export cannot have been made with, by name."""
    how = manifest["how"]
    size = how["max_shard_size"]
    for key, fits in (
        *((key, manifest[key] in known) for key, known in _CHOICES.items()),
        ("how.threads", 1 <= how["threads"] <= _MOST),
        ("how.adapter_rank", 1 <= how["adapter_rank"] <= _MOST),
        ("how.max_shard_size", size is None or re.fullmatch(SIZE, size.strip()) is not None),
    ):
        if not fits:
            yield key, manifest[key] if key in _CHOICES else how[key.removeprefix("how.")]


@dataclass(frozen=True)
class Comparison:
    """An export beside the one that it repeats."""

    equal: list[str]
    different: list[str]
    missing: list[str]
    """Files that were not written again."""
    added: list[str]
    """Files that the first export lacks."""
    versions: dict[str, tuple[str, str]]
    """Of packages that differ: then and now."""

    @property
    def same(self) -> bool:
        """Whether all files are the same, byte for byte."""
        return not (self.different or self.missing or self.added)


def compare(then: dict[str, Any], now: dict[str, Any]) -> Comparison:
    """Two manifests."""
    old, new = dict(then["files"]), dict(now["files"])
    shared = sorted(old.keys() & new.keys())
    versions = {name: (version, str(now["versions"].get(name))) for name, version in then["versions"].items()}
    return Comparison(
        equal=[name for name in shared if old[name] == new[name]],
        different=[name for name in shared if old[name] != new[name]],
        missing=sorted(old.keys() - new.keys()),
        added=sorted(new.keys() - old.keys()),
        versions={name: pair for name, pair in versions.items() if pair[0] != pair[1]},
    )
