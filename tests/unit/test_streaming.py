"""Checkpoints edited from file to file against models edited in memory and saved."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from heretic_ds.ablation import Ablation, Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.open import ModelChoice, load_weights, open_model
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.export.checkpoint import export_model
from heretic_ds.export.streaming import EditedFiles, shared_out
from tests import families

EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.5)})
FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "phi3", "deepseek_v3")


def random_ablation(anatomy, row_norm):
    """Directions that are the same in every test."""
    generator = torch.Generator().manual_seed(0)
    directions_LD = torch.randn(anatomy.n_blocks + 1, anatomy.width, generator=generator, dtype=torch.float64)
    return Ablation(torch.nn.functional.normalize(directions_LD, dim=-1), row_norm, through_norm=True)


def tensors_of(folder):
    merged = {}
    for file in folder.glob("*.safetensors"):
        merged.update(load_file(file))
    return merged


@pytest.mark.parametrize("row_norm", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_weights_equal_saved_ones(family, row_norm, tmp_path):
    families.save(family, tmp_path / "original")
    opened = open_model(ModelChoice(path=str(tmp_path / "original")))
    loaded = load_weights(opened)
    anatomy = find_anatomy(loaded.model)
    ablation = random_ablation(anatomy, row_norm)

    described, weights = EditedFiles.plan(opened, anatomy, ablation, EDIT, loaded.dtype)
    export_model(described, tmp_path / "streamed", "card", {"schema": 1}, weights=weights)

    original = tensors_of(tmp_path / "original")
    editor = WeightEditor(loaded.model, anatomy)
    editor.prepare(ablation)
    editor.set_edit(EDIT)
    export_model(loaded, tmp_path / "saved", "card", {"schema": 1})

    streamed, saved = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "saved")
    assert streamed.keys() == saved.keys()
    changed = {name for name in saved if not torch.equal(saved[name], original[name])}
    assert len(changed) >= 4
    for name, tensor in saved.items():
        if name in changed:  # equal but for the rounding of products over memory that is aligned otherwise
            assert torch.allclose(streamed[name], tensor, rtol=1e-6, atol=1e-7), name
        else:
            assert torch.equal(streamed[name], tensor), name
    again = open_model(ModelChoice(path=str(tmp_path / "streamed")))
    reloaded = load_weights(again).model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.allclose(tensor, reloaded[name], rtol=1e-6, atol=1e-7), name


def test_the_index_tells_the_size_in_the_dtype_that_was_written(tmp_path):
    families.build("llama").save_pretrained(tmp_path / "original", max_shard_size="40KB")
    families.tokenizer().save_pretrained(tmp_path / "original")
    opened = open_model(ModelChoice(path=str(tmp_path / "original")))
    anatomy = find_anatomy(opened.skeleton())

    described, weights = EditedFiles.plan(opened, anatomy, random_ablation(anatomy, "full"), EDIT, torch.bfloat16)
    export_model(described, tmp_path / "streamed", "card", {"schema": 1}, weights=weights)

    before, after = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for folder in ("original", "streamed")
    )
    assert after["weight_map"] == before["weight_map"] and len(set(after["weight_map"].values())) > 2
    written = tensors_of(tmp_path / "streamed")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] // 2
    for file in (tmp_path / "streamed").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "again", metadata={"format": "pt"})
        assert (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("streamed", [False, True])
def test_heads_that_transformers_drops_are_kept(streamed, tmp_path):
    """File to file, whether the model was saved from memory or its files were edited."""
    families.save("qwen3", tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    extra = {"mtp.layers.0.mlp.down_proj.weight": torch.randn(32, 48), "mtp.norm.weight": torch.randn(32)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    opened = open_model(ModelChoice(path=str(tmp_path / "original")))
    loaded, weights = load_weights(opened), None
    if streamed:
        anatomy = find_anatomy(loaded.model)
        ablation = random_ablation(anatomy, "full")
        loaded, weights = EditedFiles.plan(opened, anatomy, ablation, EDIT, torch.bfloat16)
    else:
        loaded.model.bfloat16()
        loaded.dtype = torch.bfloat16
    result = export_model(loaded, tmp_path / "out", "card", {"schema": 1}, weights=weights)
    assert result.carried == tuple(sorted(extra))
    written = tensors_of(tmp_path / "out")
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in extra.items())
    load_weights(open_model(ModelChoice(path=str(tmp_path / "out"))))


def test_streamed_files_are_as_large_as_is_asked(tmp_path):
    families.save("llama", tmp_path / "original")
    opened = open_model(ModelChoice(path=str(tmp_path / "original")))
    anatomy = find_anatomy(opened.skeleton())
    ablation = random_ablation(anatomy, "full")
    whole, small = (EditedFiles.plan(opened, anatomy, ablation, EDIT, torch.float32, size) for size in (None, "40KB"))
    for name, (described, weights) in {"whole": whole, "small": small}.items():
        export_model(described, tmp_path / name, "card", {"schema": 1}, weights=weights)
    files = list((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 2 and max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 40_000
    once, again = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "small")
    assert once.keys() == again.keys() and all(torch.equal(once[name], tensor) for name, tensor in again.items())
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    load_weights(open_model(ModelChoice(path=str(tmp_path / "small"))))


def test_other_metadata_of_a_file_is_kept(tmp_path):
    families.save("llama", tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "mlx", "made_by": "somebody"})
    opened = open_model(ModelChoice(path=str(tmp_path / "original")))
    anatomy = find_anatomy(opened.skeleton())
    _, weights = EditedFiles.plan(opened, anatomy, random_ablation(anatomy, "full"), EDIT, torch.float32)
    weights.write_file(tmp_path, file.name)
    with safe_open(tmp_path / file.name, framework="pt") as written:
        assert written.metadata() == {"format": "pt", "made_by": "somebody"}


def test_files_are_shared_out_by_their_bytes():
    sizes = {"a": 5, "b": 9, "c": 4, "d": 4, "e": 2}
    assert shared_out(sizes, 1) == [["b", "a", "c", "d", "e"]]
    assert shared_out(sizes, 2) == [["b", "d"], ["a", "c", "e"]]
    assert shared_out({"a": 5}, 3) == [["a"], [], []]
