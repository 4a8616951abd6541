"""Names for others to read: models and data in an export, without paths of this machine."""

from __future__ import annotations

from pathlib import Path

from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.checkpoint.source import CONFIG_NAME, is_hub_id, read_json


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
    path = Path(source).expanduser()
    return source if is_hub_id(source) and not path.exists() else path.name
