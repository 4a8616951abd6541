"""``task=geometry`` and ``report.html`` as a user meets them, in one run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Heretic, Material, read_results
from tests.e2e.plain import PlainModel

PICTURES = ("geometry.png", "geometry_pca.png")


def test_a_search_its_report_and_the_geometry_of_its_residuals(
    heretic: Heretic, material: Material, tmp_path: Path
) -> None:
    model = material.model("llama")
    done = heretic(*material.words(model, "run.dir=run"))
    run = tmp_path / "run"
    assert done.status == 0, done.err
    assert "the report is run/report.html" in done.out
    text = (run / "report.html").read_text()
    examples = read_results(run)["examples"]
    assert [example["prompt"] for example in examples] == material.prompts["target.eval"][:6]
    originals = PlainModel.load(model).answers(material.prompts["target.eval"][:6], 12)
    for example, whole in zip(examples, originals, strict=True):
        assert whole.startswith(example["original"]) and example["original"]
    assert "Cosines" in text and "Separability" not in text and "task=geometry" in text

    before = (run / "results.json").read_bytes(), (run / "config.yaml").read_bytes()
    measured = heretic(*material.words(model, "run.dir=run", "task=geometry"))
    assert measured.status == 0, measured.err
    assert "Residuals at the last prompt token" in measured.out
    assert before == ((run / "results.json").read_bytes(), (run / "config.yaml").read_bytes())
    assert all((run / name).stat().st_size > 1000 for name in PICTURES)
    assert "Separability" in (run / "report.html").read_text()
    assert sorted(file.name for file in run.iterdir() if file.name.startswith(".")) == [".lock"]
    found = json.loads((run / "geometry.json").read_text())
    assert_right(found, PlainModel.load(model), material)

    again = heretic(*material.words(model, "run.dir=run", "task=geometry"))
    assert again.status == 0 and "run/geometry.json holds these numbers already" in again.out
    assert json.loads((run / "geometry.json").read_text()) == found
    other = heretic(*material.words(model, "run.dir=run", "task=geometry", "task.blocks=[2]"))
    assert other.status == 0 and "capturing" in other.out
    drawn = json.loads((run / "geometry.json").read_text())
    assert [each["block"] for each in drawn["projections"]] == [2] and drawn["layers"] == found["layers"]


def assert_right(found: dict[str, Any], plain: PlainModel, material: Material) -> None:
    """Against means that transformers alone gives."""
    means = {kind: plain.mean_residuals(material.prompts[f"{kind}.train"]) for kind in ("target", "baseline")}
    direction_LD = means["target"] - means["baseline"]
    assert found["prompts"] == {"target": 18, "baseline": 17}
    assert [layer["block"] for layer in found["layers"]] == [None, 0, 1, 2, 3]
    for entry, layer in enumerate(found["layers"]):
        for kind, mean_LD in means.items():
            assert layer[f"{kind}_norm"] == pytest.approx(float(mean_LD[entry].norm()), rel=1e-5)
        if entry:
            cosine = torch.nn.functional.cosine_similarity
            assert layer["direction_norm"] == pytest.approx(float(direction_LD[entry].norm()), rel=1e-4)
            expected = cosine(means["target"][entry], direction_LD[entry], dim=0)
            assert layer["cos_target_direction"] == pytest.approx(float(expected), abs=1e-4)
            assert -1 <= layer["silhouette"] <= 1 and 0 <= layer["accuracy"] <= 1
    for each in found["projections"]:
        assert (len(each["target"]), len(each["baseline"])) == (18, 17) and sum(each["explained"]) <= 1.000001


def test_geometry_alone_and_what_it_refuses(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    model = material.model("llama")
    beyond = heretic(*material.words(model, "run.dir=run", "task=geometry", "task.blocks=[1,4]"))
    assert (beyond.status, beyond.err) == (
        2,
        "heretic-ds: task.blocks names 4, but the model's blocks are 0 to 3\n",
    )
    assert not (tmp_path / "run").exists()
    alone = heretic(*material.words(model, "run.dir=run", "task=geometry"))
    assert alone.status == 0, alone.err
    assert (tmp_path / "run" / "geometry.json").is_file()
    assert not (tmp_path / "run" / "report.html").exists()  # there is no search to report


def test_pacmap_is_named_where_it_is_missing(
    heretic: Heretic, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pacmap", None)
    words = material.words(material.model("llama"), "run.dir=run", "task=geometry")
    missing = heretic(*words, "task.projection=pacmap")
    assert (missing.status, missing.err) == (
        2,
        'heretic-ds: task.projection=pacmap needs PaCMAP: pip install "heretic-ds[report]", or leave '
        "task.projection=pca\n",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_pacmap_draws(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    pytest.importorskip("pacmap", reason='pip install "heretic-ds[report]"')
    words = material.words(material.model("llama"), "run.dir=run", "task=geometry", "task.projection=pacmap")
    done = heretic(*words, "task.blocks=[3]")
    assert done.status == 0, done.err
    assert (tmp_path / "run" / "geometry_pacmap.png").is_file()
    [found] = json.loads((tmp_path / "run" / "geometry.json").read_text())["projections"]
    assert found["explained"] is None and len(found["target"]) == 18
