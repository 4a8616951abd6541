"""What a second look at a run finds: its record stays whole, inputs that changed are noticed, edits that do nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import families
from tests.e2e.conftest import Heretic, Material, read_results


@pytest.fixture
def refused(heretic: Heretic) -> Callable[..., str]:
    """`refused(words)`: the one line on standard error of a command that ends with status 2."""

    def run(words: list[str]) -> str:
        outcome = heretic(*words)
        assert outcome.status == 2, outcome.err or outcome.out
        [line] = outcome.err.splitlines()
        return line

    return run


def test_a_menu_left_at_once_leaves_the_record(
    heretic: Heretic, material: Material, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = material.words(material.model("llama"), "run.dir=run", "search.trials=3")
    assert heretic(*words).status == 0
    before = read_results("run")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert heretic(*words, "run.interactive=true").status == 0
    after = read_results("run")
    for key in ("selected", "verified", "finished", "trials", "pareto"):
        assert after[key] == before[key], key
    assert before["selected"] is not None and "finished" in before
    assert "is finished" in heretic(*words).out


def test_an_export_without_its_weights_is_not_finished(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"), "run.dir=run", "search.trials=3")
    assert heretic(*words).status == 0
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    again = heretic(*words)
    assert again.status == 0 and "is finished" not in again.out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_changed_template_is_another_configuration(heretic, refused, material: Material, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(families.CHAT_TEMPLATE)
    words = material.words(material.model("llama"), "run.dir=run", f"prompts.template={template}", "search.trials=3")
    assert heretic(*words).status == 0
    template.write_text(families.CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|> "))
    assert "prompts.template.content was" in refused([*words, "search.trials=4"])


def test_a_changed_saved_data_set_is_another_configuration(heretic, refused, material, tmp_path: Path) -> None:
    from datasets import Dataset

    saved = tmp_path / "prompts"
    Dataset.from_dict({"text": ["plant kale", "sow beans"]}).save_to_disk(saved)
    source = f"prompts.baseline.eval.source={saved}"
    words = material.words(material.model("llama"), "run.dir=run", source, "search.trials=3")
    assert heretic(*words).status == 0
    shutil.rmtree(saved)
    Dataset.from_dict({"text": ["plant kale", "sow peas"]}).save_to_disk(saved)
    assert "prompts.baseline.eval.digest was" in refused([*words, "search.trials=4"])


def test_a_mistake_leaves_an_empty_run_folder_empty_but_for_directions(
    refused, heretic, material: Material, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(material.model("llama"), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run").mkdir()
    assert "model.norm.weight" in refused(material.words(damaged, "run.dir=run"))
    assert not list((tmp_path / "run").iterdir())
    silent = material.words(material.model("llama"), "run.dir=run", "scoring.markers=[never said by it]")
    assert "nothing to search for" in refused(silent)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["directions.safetensors"]


def test_prompts_that_do_not_differ(refused, material: Material) -> None:
    same = f"prompts.target.train.source={material.prompt_file('baseline.train')}"
    assert "no direction between them" in refused(material.words(material.model("llama"), same, "run.dir=run"))


def test_the_run_folder_is_no_export_folder(refused, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"))
    for target in ("here", "."):
        line = refused([*words, "run.dir=here", f"export.dir={target}"])
        assert "holds the run folder" in line and "export.dir" in line
    assert not (tmp_path / "here").exists()


def test_a_known_direction_is_checked_before_the_run(refused, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"), "run.dir=run")
    assert "direction.compare=nowhere" in refused([*words, "direction.compare=nowhere"])
    save_file({"direction": torch.ones(7)}, tmp_path / "narrow.safetensors")
    assert "32 wide" in refused([*words, "direction.compare=narrow.safetensors"])
    assert not (tmp_path / "run").exists()


def test_an_edit_that_reaches_no_layer(refused, material: Material) -> None:
    profile = [
        f"ablation.profiles.mlp.{key}"
        for key in ("max_weight=1", "max_weight_position=99", "min_weight=0.5", "min_weight_distance=1")
    ]
    line = refused(material.words(material.model("llama"), "task=evaluate", *profile))
    assert "reach no layer" in line and "0 to 3" in line


def test_another_trial_exported_shows_both_scores(heretic: Heretic, material: Material, tmp_path: Path) -> None:
    words = material.words(material.model("llama"), "run.dir=run", "search.trials=3")
    assert heretic(*words).status == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    done = heretic(*words, "task=export", "export.trial=1", "export.dir=other")
    assert done.status == 0 and "trial 1: " in done.out and "on edited weights" in done.out
    trial = read_results("run")["trials"][1]
    manifest = json.loads((tmp_path / "other" / "heretic_ds.json").read_text())
    assert manifest["scores"] == {"refusals": trial["refusals"], "kl": trial["kl"]}
    assert manifest["verified"]["refusals"] == trial["refusals"]
    assert (tmp_path / "run" / "config.yaml").read_text() == config
