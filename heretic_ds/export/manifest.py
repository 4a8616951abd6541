"""The machine-readable record of an export: what was done to which model, with which versions and numbers.

Names in it, and in the card, are for others to read: without paths of this machine.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CONFIG_NAME, is_hub_id
from heretic_ds.foreign.reading import path_of, read_json

SCHEMA = 1
_PACKAGES = ("heretic-ds", "torch", "transformers", "safetensors")


def package_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that the numbers in an export depend on, and of ``more``."""
    versions = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a source tree that was not installed
            versions[package] = "not installed"
    return versions


def build_manifest(
    loaded: LoadedModel,
    *,
    edit: Mapping[str, Any],
    row_norm: str,
    through_norm: bool,
    trial: int | None,
    scores: Mapping[str, Any],
    verified: Mapping[str, Any] | None,
    tensors_edited: Sequence[str],
) -> dict[str, Any]:
    """The content of `heretic_ds.json`. `edit` is the edit as a dictionary, `scores` those of its trial.

    `tensors_edited` are module or checkpoint names of the writers whose weights changed.
    """
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": public_model_name(loaded),
        "revision": loaded.revision,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "dequantized_from": loaded.quantization,
        "trial": trial,
        "edit": dict(edit),
        "row_norm": row_norm,
        "through_norm": through_norm,
        "scores": dict(scores),
        "verified": None if verified is None else dict(verified),
        "tensors_edited": list(tensors_edited),
        "versions": package_versions(),
    }


def public_model_name(loaded: LoadedModel) -> str:
    """Hub id of the base model, where its files tell it, else its folder's name."""
    if loaded.is_hub:
        return loaded.model_name
    config = loaded.source / CONFIG_NAME
    origin = str(read_json(config).get("_name_or_path") or "") if config.is_file() else ""
    if "/" in origin and is_hub_id(origin) and not Path(origin).exists():
        return origin
    return Path(loaded.model_name).name


def public_data_name(source: str) -> str:
    """A prompt source as it may be published: a hub data set's id, but only the last part of a path."""
    path = path_of(source, "prompts")
    return source if is_hub_id(source) and not path.exists() else path.name
