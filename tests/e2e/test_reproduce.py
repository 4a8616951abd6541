"""`heretic-ds reproduce`: an export again, from its manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.conftest import Heretic, Material
from tests.e2e.test_fixed_edit import EDIT


def exported(material: Material, heretic: Heretic, *words: str) -> Path:
    usual = ("task=export", "model.dtype=float32", "scoring.markers=[e]", *EDIT, "run.dir=run", "export.dir=first")
    outcome = heretic(*material.words(material.model("llama"), *usual, *words))
    assert outcome.status == 0, outcome.err
    return Path("first")


@pytest.mark.parametrize(
    "words",
    [
        ("export.format=both", "ablation.row_norm=pre", "export.max_shard_size=30KB"),
        ("export.format=adapter", "export.adapter_rank=4"),
        ("direction.method=som", "ablation.rank=2", "ablation.direction_index=1.3"),
    ],
    ids=["both", "adapter", "two directions"],
)
def test_an_export_is_made_again_byte_for_byte(words, material: Material, heretic: Heretic) -> None:
    first = exported(material, heretic, *words)
    for part in first.rglob("*.safetensors"):  # what others get may be the small files alone
        if part.parent.name != "reproduce":
            part.unlink()
    outcome = heretic("reproduce", first / "heretic_ds.json", f"model.path={material.model('llama')}")
    assert outcome.status == 0, outcome.err + outcome.out
    assert "files are the same, byte for byte" in outcome.out + outcome.err
    assert list(Path("first-reproduced").rglob("*.safetensors"))
    again = heretic("reproduce", first, f"model.path={material.model('llama')}")
    assert again.status == 2 and "export.overwrite=true" in again.err


def test_what_differs_is_named(material: Material, heretic: Heretic) -> None:
    first = exported(material, heretic)
    file = first / "heretic_ds.json"
    manifest = json.loads(file.read_text())
    manifest["edit"]["profiles"]["mlp"]["max_weight"] += 0.1
    manifest["files"]["gone.txt"] = "0"
    manifest["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(manifest))
    outcome = heretic("reproduce", file, f"model.path={material.model('llama')}", "export.dir=again")
    said = " ".join((outcome.out + outcome.err).split())
    assert outcome.status == 1, said
    for words in ("model.safetensors differs", "gone.txt was not made", "version of torch: 1.0 then"):
        assert words in said, words
    assert "config.json differs" not in said


def test_mistakes(material: Material, heretic: Heretic, tmp_path: Path) -> None:
    first = exported(material, heretic)
    model = f"model.path={material.model('llama')}"
    for words, told in (
        ((), "reproduce takes one export"),
        (("nothing", model), "is no heretic_ds.json"),
        ((first,), "is no hub id; say where that model is: model.path="),
        ((first, model, "search.trials=3"), "reproduce takes no search.trials"),
        ((first, model, "export.dir=first"), "is the export that is to be made again"),
        ((first, f"model.path={material.model('llama', layers=2)}"), "its shapes differ"),
    ):
        outcome = heretic("reproduce", *words)
        assert outcome.status == 2 and told in outcome.err, outcome.err
    directions = first / "reproduce" / "directions.safetensors"
    shutil.copyfile(first / "model.safetensors", directions)
    assert "is not the file that heretic_ds.json was written with" in heretic("reproduce", first, model).err
    directions.unlink()
    assert "is missing; get the folder reproduce" in heretic("reproduce", first, model).err
