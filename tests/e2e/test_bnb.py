"""Runs on weights that bitsandbytes packs in 4 or 8 bits: search, resume, export, and files that are packed already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heretic_ds.stages.sharing import rescoring
from tests import families
from tests.bnb import PACKED, needs_bnb, save_packed
from tests.e2e.conftest import Heretic, Material, outcome_of, read_results
from tests.e2e.test_fixed_edit import EDIT
from tests.unit.test_sharded_loading import save_transposed_experts

pytestmark = needs_bnb
FEW = ("search.trials=3", "search.startup_trials=2", "model.dtype=float32")


def ran(heretic: Heretic, *words: str) -> str:
    outcome = heretic(*words)
    said = outcome.out + outcome.err
    assert outcome.status == 0, said
    return " ".join(said.split())


@pytest.mark.parametrize("quantization", ["bnb_4bit", pytest.param("bnb_8bit", marks=pytest.mark.thorough)])
def test_a_run_resumes_and_exports_from_the_original_files(
    quantization: str, material: Material, heretic: Heretic
) -> None:
    model, packing = material.model("llama", width=64), f"model.quantization={quantization}"
    words = material.words(model, *FEW, packing, "search.trials_per_pass=2", "verify.final=true", "run.dir=run")
    said = ran(heretic, *words)
    bits = quantization[4]
    assert f"weights in {bits} bits by bitsandbytes" in said and "on edited outputs" in said
    assert "MatMul8bitLt" not in said and "quantization_config" not in said
    results = read_results("run")
    assert results["quantization"] == quantization and results["dtype"] == "float32" and results["finished"]
    assert results["final"]["quantization"] == "none"
    trial = results["trials"][results["selected"]]
    assert results["verified"]["kl"] == pytest.approx(trial["kl"], abs=2e-3)

    manifest = json.loads(Path("run/model/heretic_ds.json").read_text())
    assert manifest["searched_in"] == quantization and manifest["dequantized_from"] is None
    again = ran(heretic, "reproduce", "run/model", f"model.path={model}")
    assert "files are the same, byte for byte" in again

    ours, plain = load_file("run/model/model.safetensors"), load_file(model / "model.safetensors")
    changed = {name for name in plain if not plain[name].equal(ours[name])}
    assert ours.keys() == plain.keys() and changed == set(manifest["tensors_edited"])
    config = json.loads(Path("run/model/config.json").read_text())
    assert "quantization_config" not in config
    card = Path("run/model/README.md").read_text()
    assert f"searched on a copy with weights in {bits} bits by bitsandbytes" in card and "not packed" in card

    finished = outcome_of(results["trials"])
    journal = Path("run/study.journal")
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    Path("run/results.json").unlink()
    ran(heretic, *words)
    assert outcome_of(read_results("run")["trials"]) == finished
    other = heretic(*material.words(model, *FEW, "run.dir=run"))
    assert other.status == 2 and "model.quantization was" in other.err


@pytest.mark.parametrize("form", ["none", pytest.param("pre", marks=pytest.mark.thorough), "full"])
def test_an_export_is_that_of_the_same_edit_without_packing(form: str, material: Material, heretic: Heretic) -> None:
    """Given the same directions: the numbers come from the same files. Bit for bit, but for ``full``, whose products of
    matrices depend on where in memory these lie."""
    model = material.model("llama", width=64)
    usual = ("task=export", "model.dtype=float32", "scoring.markers=[e]", f"ablation.row_norm={form}", *EDIT)
    packed = material.words(model, *usual, "model.quantization=bnb_4bit", "run.dir=run", "export.dir=packed")
    ran(heretic, *packed, "export.format=both")
    recipe = json.loads(Path("packed/heretic_ds.json").read_text())
    assert recipe["how"]["from_files"] is True
    ran(heretic, "reproduce", "packed", f"model.path={model}", "export.dir=again")

    recipe["how"]["from_files"] = False  # as a run writes that holds the model whole and not packed
    Path("packed/heretic_ds.json").write_text(json.dumps(recipe))
    heretic("reproduce", "packed", f"model.path={model}", "export.dir=whole")
    ours, whole = load_file("packed/model.safetensors"), load_file("whole/model.safetensors")
    assert ours.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, ours[name], rtol=1e-5, atol=1e-7) if form == "full" else tensor.equal(ours[name])
    assert (Path("packed/adapter/adapter_model.safetensors").read_bytes()) == (
        Path("again/adapter/adapter_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("quantization", PACKED)
def test_files_that_are_packed_already(quantization: str, material: Material, heretic: Heretic) -> None:
    plain = material.model("llama", width=128)
    model = save_packed(plain, material.folder / f"stored-{quantization}", quantization)
    usual = (str(model), "task=export", "model.dtype=float32", "scoring.markers=[e]", *EDIT)
    for name in ("none", quantization):
        words = material.words(*usual, f"model.quantization={name}", f"run.dir=run-{name}", f"export.dir={name}")
        ran(heretic, *words)
        config = json.loads(Path(name, "config.json").read_text())
        assert "quantization_config" not in config
        card = Path(name, "README.md").read_text()
        assert "The base model is quantised (bitsandbytes); this copy is not" in card
        assert json.loads(Path(name, "heretic_ds.json").read_text())["dequantized_from"] == "bitsandbytes"
    shapes = {key: value.shape for key, value in load_file(plain / "model.safetensors").items()}
    assert {key: value.shape for key, value in load_file(f"{quantization}/model.safetensors").items()} == shapes
    whole, ours = (load_file(f"{name}/model.safetensors") for name in ("none", quantization))
    recipe = json.loads(Path(quantization, "heretic_ds.json").read_text())
    assert recipe["how"]["from_files"] is True
    unedited = whole.keys() - set(recipe["tensors_edited"])
    assert unedited and all(whole[name].equal(ours[name]) for name in unedited)  # one matrix at a time, or all at once
    again = ran(heretic, "reproduce", quantization, f"model.path={model}", "export.dir=again")
    assert "files are the same, byte for byte" in again
    other = next(name for name in PACKED if name != quantization)
    refused = heretic(*material.words(*usual, f"model.quantization={other}", "run.dir=other"))
    assert refused.status == 2 and f"set model.quantization={quantization} or none" in refused.err


def test_writers_that_only_a_conversion_can_make_are_written_whole(material: Material, heretic: Heretic) -> None:
    """Experts that lie transposed in files: no tensor of theirs can be edited as it is stored."""
    model = material.folder / "transposed"
    save_transposed_experts(model)
    families.tokenizer().save_pretrained(model)
    usual = ("task=export", "model.dtype=float32", "scoring.markers=[e]", "export.format=both", *EDIT)
    ran(heretic, *material.words(model, *usual, "model.quantization=bnb_8bit", "run.dir=run", "export.dir=edited"))
    recipe = json.loads(Path("edited/heretic_ds.json").read_text())
    assert recipe["how"]["from_files"] is False and recipe["searched_in"] == "bnb_8bit"
    again = ran(heretic, "reproduce", "edited", f"model.path={model}")  # never packed, adapter included
    assert "files are the same, byte for byte" in again


def test_final_scores_are_of_packed_models_where_others_do_not_fit(
    material: Material, heretic: Heretic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescoring, "free_on_host", lambda: 0)
    words = ("task=export", "model.dtype=float32", "scoring.markers=[e]", "model.quantization=bnb_4bit", *EDIT)
    usual = ("run.dir=run", "export.dir=edited", "verify.final=true", "verify.resamples=100")
    said = ran(heretic, *material.words(material.model("llama", width=64), *words, *usual))
    assert "there is no room for weights that are not packed" in said
    assert json.loads(Path("edited/heretic_ds.json").read_text())["final"]["quantization"] == "bnb_4bit"
    assert "Both were read with weights in 4 bits by bitsandbytes." in Path("edited/README.md").read_text()


def test_what_packs_nothing_of_a_model_is_said_to_nowhere(material: Material, heretic: Heretic) -> None:
    words = (*FEW, "search.trials=1", "model.quantization=bnb_4bit", "run.dir=run")
    said = ran(heretic, *material.words(material.model("llama"), *words))
    assert "model.quantization=bnb_4bit packs nothing of" in said
    written = said + "".join(Path("run", name).read_text() for name in ("model/README.md", "report.html", "run.log"))
    assert "4 bits" not in written and read_results("run")["quantization"] == "none"
    assert json.loads(Path("run/model/heretic_ds.json").read_text())["searched_in"] == "none"


def test_what_is_refused(material: Material, heretic: Heretic) -> None:
    model, packing = material.model("llama", width=64), "model.quantization=bnb_4bit"
    for word in ("evaluate=tensor_parallel", "capture=zero3", "evaluate=vllm"):
        outcome = heretic(*material.words(model, packing, word))
        assert outcome.status == 2 and "packs whole matrices" in outcome.err, outcome.err
    planned = " ".join(ran(heretic, *material.words(model, packing, "task=plan", "hardware=rtx4090x2")).split())
    assert "capture and evaluate=replicated" in planned
    unknown = heretic(*material.words(model, "model.quantization=int4"))
    assert unknown.status == 2 and "choose one of none, bnb_4bit, bnb_8bit" in unknown.err
    assert not list(Path().glob("runs/*"))
