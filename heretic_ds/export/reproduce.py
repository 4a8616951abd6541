"""What lets others make an export again: the directions that its edit refers to, and a digest of every file."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FOLDER, DIRECTIONS = "reproduce", "directions.safetensors"
_THREADS = 8


def write_directions(folder: Path, directions_LD: Tensor) -> None:
    """Keep the unit directions [L+1, D], float64, in an export's folder."""
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file({"directions": directions_LD.contiguous().cpu()}, folder / FOLDER / DIRECTIONS)


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
