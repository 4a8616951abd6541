"""The machine-readable record of an export: what was done to which model, with which versions and numbers.

Names in it, and in the card, are for others to read: without paths of this machine.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CARD_NAME, CONFIG_NAME, is_hub_id, read_json

log = logging.getLogger(__name__)

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
    """Hub id of the base model, where its folder or its files tell it, else its folder's name.

    They are asked in this order: a cache of the hub, whose folders bear ids; ``_name_or_path`` of the configuration;
    the model that the card gives results of; the link to its licence, where the folder bears the same name.
    """
    if loaded.is_hub:
        return loaded.model_name
    folder = loaded.source
    for name in _names_told(folder):
        if "/" in name and is_hub_id(name) and not Path(name).exists():
            return name
    return Path(loaded.model_name).name


def _names_told(folder: Path) -> Iterator[str]:
    """What may be the hub id of the model in a folder, the surest first."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        yield "/".join(folder.parents[1].name.split("--")[1:])
    config = folder / CONFIG_NAME
    if config.is_file():
        yield str(read_json(config).get("_name_or_path") or "")
    front = front_matter(folder / CARD_NAME)
    index = front.get("model-index")
    for entry in index if isinstance(index, list) else []:
        yield str(entry.get("name") or "") if isinstance(entry, dict) else ""
    linked = re.match(r"https://huggingface\.co/([\w.-]+/([\w.-]+))/", str(front.get("license_link") or ""))
    if linked and linked[2].lower() == folder.name.lower():
        yield linked[1]


def front_matter(card: Path) -> dict[str, Any]:
    """The front matter of a model's own card; empty where it has none."""
    block = REGEX_YAML_BLOCK.search(card.read_text("utf-8-sig", "replace") if card.is_file() else "")
    try:
        front = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        log.warning("the front matter of %s cannot be read, its licence is not carried over: %s", card, error)
        front = None
    return front if isinstance(front, dict) else {}


def public_data_name(source: str) -> str:
    """A prompt source as it may be published: a hub data set's id, but only the last part of a path."""
    path = Path(source).expanduser()
    return source if is_hub_id(source) and not path.exists() else path.name
