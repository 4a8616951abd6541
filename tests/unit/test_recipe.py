"""The manifest of an export that is made again: somebody else wrote it."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from heretic_ds.errors import UserError
from heretic_ds.export.reproduce import Recipe

MANIFEST: dict[str, Any] = {
    "base_model": "owner/model",
    "revision": None,
    "dtype": "float32",
    "edit": {"direction_index": None, "profiles": {}},
    "row_norm": "full",
    "through_norm": False,
    "format": "model",
    "how": {"device": "cpu", "threads": 1, "from_files": False, "max_shard_size": None, "adapter_rank": 8},
    "versions": {"torch": "2.0"},
}


def export(folder: Path, **tensors: torch.Tensor) -> dict[str, Any]:
    """The small files of an export; its manifest."""
    stored = folder / "reproduce" / "directions.safetensors"
    stored.parent.mkdir()
    save_file(tensors or {"directions": torch.eye(3, 4, dtype=torch.float64)}, stored)
    files = {"reproduce/directions.safetensors": sha256(stored.read_bytes()).hexdigest()}
    manifest = {**MANIFEST, "files": files}
    (folder / "heretic_ds.json").write_text(json.dumps(manifest))
    return manifest


def test_what_an_export_needs_is_read(tmp_path: Path) -> None:
    manifest = export(tmp_path)
    for path in (tmp_path, tmp_path / "heretic_ds.json"):
        recipe = Recipe.read(path)
        assert recipe.manifest == manifest and recipe.directions.shape == (3, 4)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"edit": []}, "heretic_ds.json.edit is"),
        ({"edit": {"direction_index": None, "profiles": {"mlp": {"nonsense": 1.0}}}}, "nonsense"),
        ({"edit": {"profiles": {}}}, "direction_index"),
        ({"dtype": "load"}, "'load' as its dtype"),
        ({"row_norm": "x\x1b[31m"}, "as its row_norm"),
        ({"format": "gguf"}, "as its format"),
        ({"files": {"a": 1}}, "heretic_ds.json.files.a is 1"),
        ({"how": {}}, "does not say 'how.device'"),
        ({"how": MANIFEST["how"] | {"threads": 10**9}}, "as its how.threads"),
        ({"how": MANIFEST["how"] | {"adapter_rank": 0}}, "as its how.adapter_rank"),
        ({"how": MANIFEST["how"] | {"max_shard_size": "much"}}, "as its how.max_shard_size"),
    ],
)
def test_a_manifest_that_no_export_has(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    (tmp_path / "heretic_ds.json").write_text(json.dumps(export(tmp_path) | changed))
    with pytest.raises(UserError) as found:
        Recipe.read(tmp_path)
    [line] = str(found.value).splitlines()
    assert told in line and "\x1b" not in line


def test_directions_that_are_none(tmp_path: Path) -> None:
    export(tmp_path, other=torch.ones(1))
    with pytest.raises(UserError, match="is damaged: KeyError: 'directions'; get it anew"):
        Recipe.read(tmp_path)
