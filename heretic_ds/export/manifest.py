"""The machine-readable record of an export: what was done to which model, with which versions and numbers.

Names in it, and in the card, are for others to read: without paths of this machine.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CARD_NAME, CONFIG_NAME, is_hub_id
from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import MEBIBYTE, path_of, read_json, read_text, reading

SCHEMA = 1
_CARD_LIMIT, _FRONT_LIMIT = 4 * MEBIBYTE, 2**16
_MOST_VALUES, _LONGEST_VALUE = 200, 200
_HUB_FILE = r"https://huggingface\.co/([\w.-]+/([\w.-]+))/"
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


def build_manifest(loaded: LoadedModel, **done: Any) -> dict[str, Any]:
    """The content of `heretic_ds.json`: the model as it was, what was ``done`` to it, and the versions that did it."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": public_model_name(loaded),
        "revision": loaded.revision,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "dequantized_from": loaded.quantization,
        **done,
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
    """What may be the hub id of the model in a folder, the surest first; texts that nobody would call one are not."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        yield "/".join(folder.parents[1].name.split("--")[1:])
    config = folder / CONFIG_NAME
    told = [read_json(config).get("_name_or_path")] if config.is_file() else []
    try:
        front = front_matter(folder / CARD_NAME)
    except UserError:  # of which `card.warn_of_terms` tells
        front = {}
    index = front.get("model-index")
    told += [entry.get("name") for entry in index if isinstance(entry, dict)] if isinstance(index, list) else []
    yield from (name for name in told if isinstance(name, str) and is_plain(name))
    link = front.get("license_link")
    linked = isinstance(link, str) and is_plain(link) and re.match(_HUB_FILE, link)
    if linked and linked[2].lower() == folder.name.lower():
        yield linked[1]


def front_matter(card: Path) -> dict[str, Any]:
    """The front matter of a model's own card; empty where it has none. Raises UserError for one that cannot be read,
    or that nobody would write. Of what it holds only what :func:`is_plain` goes into another card."""
    if not card.is_file():
        return {}
    with reading(card, "its licence is unknown", "has a front matter that cannot be read"):
        block = REGEX_YAML_BLOCK.search(read_text(card, _CARD_LIMIT, encoding="utf-8-sig", errors="replace"))
        if block is not None and len(block[2]) > _FRONT_LIMIT:
            raise UserError(f"{card} has a front matter of {len(block[2])} characters")
        front = yaml.safe_load(block[2]) if block else None
    return front if isinstance(front, dict) else {}


def is_plain(value: object) -> bool:
    """Whether it is a short text in one line, or a list of such."""
    if isinstance(value, list):
        return len(value) <= _MOST_VALUES and all(isinstance(each, str) and is_plain(each) for each in value)
    return isinstance(value, str) and len(value) <= _LONGEST_VALUE and value.isprintable() and bool(value.strip())


def public_data_name(source: str) -> str:
    """A prompt source as it may be published: a hub data set's id, but only the last part of a path."""
    path = path_of(source, "prompts")
    return source if is_hub_id(source) and not path.exists() else path.name
