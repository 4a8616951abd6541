"""Adapters through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import RunCommand
from tests.e2e.conftest import Heretic, Material, files_below
from tests.e2e.test_fixed_edit import EDIT

WORDS = ["task=export", "model.dtype=float32", "scoring.markers=[e]", *EDIT]


def exported(material: Material, heretic: Heretic, *words: str, family: str = "llama"):
    return heretic(*material.words(material.model(family), *WORDS, "run.dir=run", *words))


def test_a_model_with_its_adapter(material: Material, heretic: Heretic, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    words = ("ablation.row_norm=pre", "export.format=both")
    outcome = exported(material, heretic, *words)
    assert outcome.status == 0, outcome.err
    model = tmp_path / "run" / "model"
    manifest = json.loads((model / "heretic_ds.json").read_text())
    adapter = manifest["adapter"]
    assert adapter["rank"] == 1 and adapter["exact"] and adapter["error"] == 0
    assert adapter["refusals"] == manifest["verified"]["refusals"]
    assert adapter["kl"] == pytest.approx(manifest["verified"]["kl"], rel=1e-3, abs=1e-6)
    tokens = torch.tensor([[1, 9, 40, 22, 71]])
    base, edited = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (material.model("llama"), model)
    )
    with torch.no_grad():
        expected = edited(tokens).logits
        assert (base(tokens).logits - expected).abs().max() > 1e-2
        found = peft.PeftModel.from_pretrained(base, model / "adapter")(tokens).logits
    assert (found - expected).abs().max() < 1e-5
    card = (model / "README.md").read_text()
    assert "LoRA adapter of rank 1" in card and "It is the edit itself" in card
    before = files_below(model)
    again = exported(material, heretic, *words, "export.overwrite=true")
    assert again.status == 0 and files_below(model) == before, again.err


def test_an_adapter_alone(material: Material, heretic: Heretic, tmp_path: Path) -> None:
    words = ("ablation.row_norm=full", "export.format=adapter", "export.adapter_rank=3", "export.dir=small")
    outcome = exported(material, heretic, *words)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "small"
    manifest = json.loads((folder / "heretic_ds.json").read_text())
    assert 0 < manifest["adapter"]["error"] <= manifest["adapter"]["largest_error"] < 1
    assert manifest["adapter"]["kl"] > 0 and manifest["format"] == "adapter"
    assert not (folder / "model.safetensors").exists()
    shapes = {tuple(tensor.shape) for tensor in load_file(folder / "adapter_model.safetensors").values()}
    assert all(3 in shape for shape in shapes)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "it leaves out" in card
    again = exported(material, heretic, *words, "export.overwrite=true")
    assert again.status == 0 and "holds this very adapter" in again.out + again.err, again.err


@pytest.mark.distributed
def test_ranks_that_share_a_model_make_its_adapter(
    material: Material, heretic: Heretic, run_command: RunCommand, tmp_path: Path
) -> None:
    """From the files, since no rank has a whole weight; the scores are those of the edited shards."""
    words = (*WORDS, "ablation.row_norm=pre", "export.format=adapter")
    one = heretic(*material.words(material.model("llama"), *words, "run.dir=one"))
    assert one.status == 0, one.err
    placed = ("capture=tensor_parallel", "evaluate=tensor_parallel", "run.launch=2", "run.dir=two")
    two = run_command(*material.words(material.model("llama"), *words, *placed), timeout=280)
    assert two.returncode == 0, two.stderr
    assert "exact: the scores of the edited weights are its own" in two.stdout + two.stderr
    alone, shared = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "two"))
    assert alone.keys() == shared.keys()
    assert all(torch.allclose(alone[name], shared[name], rtol=1e-4, atol=1e-5) for name in alone)
    manifests = [json.loads((tmp_path / name / "model" / "heretic_ds.json").read_text()) for name in ("one", "two")]
    assert manifests[0]["verified"]["refusals"] == manifests[1]["verified"]["refusals"]
    assert manifests[1]["adapter"]["kl"] is None and "are its own" in (tmp_path / "two/model/README.md").read_text()


def test_what_cannot_be_scored_is_refused_before_anything(material: Material, heretic: Heretic, tmp_path: Path) -> None:
    outcome = exported(material, heretic, "export.format=adapter", "evaluate=tensor_parallel")
    assert outcome.status == 2 and "set evaluate=replicated" in outcome.err
    assert not (tmp_path / "run").exists()
