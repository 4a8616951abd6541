"""Edits as LoRA adapters: what `peft` makes of the files, against the edited model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heretic_ds.ablation import Ablation, Edit, Profile, edit_weight, low_rank_edit
from heretic_ds.ablation import low_rank as low_rank_module
from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.open import ModelChoice, load_weights, open_model
from heretic_ds.edits.adapters import Adapter, make_adapter, worn
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.export.adapter import resident_writer, stored_writer, write_adapter
from heretic_ds.export.checkpoint import Beside, export_adapter, export_model
from heretic_ds.export.merging import MergedFiles, link_companions, read_adapter
from heretic_ds.world import World
from tests import families

EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.5)})
DENSE = ("llama", "qwen3", "gemma3", "gpt2", "phi3", "opt")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe", "llama4")
TOKENS = torch.tensor([[1, 9, 40, 22, 71, 15, 33], [1, 50, 12, 12, 30, 8, 64]])


def ablation_for(anatomy, row_norm: str, through_norm: bool = True) -> Ablation:
    generator = torch.Generator().manual_seed(0)
    directions_LD = torch.randn(anatomy.n_blocks + 1, anatomy.width, generator=generator, dtype=torch.float64)
    return Ablation(torch.nn.functional.normalize(directions_LD, dim=-1), row_norm, through_norm)


class Exported:
    """A tiny model with its edit as a whole model and as an adapter."""

    def __init__(self, family: str, folder: Path, row_norm: str, rank: int = 64, through_norm: bool = True) -> None:
        self.folder = folder
        families.save(family, folder / "original")
        self.loaded = load_weights(open_model(ModelChoice(path=str(folder / "original"))))
        model = self.loaded.model
        anatomy = find_anatomy(model)
        ablation = ablation_for(anatomy, row_norm, through_norm)
        self.adapter = make_adapter(anatomy, ablation, EDIT, partial(resident_writer, model), rank)
        export_adapter(self.loaded, folder / "adapter", "card", {"schema": 1}, beside=Beside(self.adapter))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with worn(model, self.adapter):
            self.worn_logits = self.logits(model)
        after = model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        editor = WeightEditor(model, anatomy)
        editor.prepare(ablation)
        editor.set_edit(EDIT)
        export_model(self.loaded, folder / "edited", "card", {"schema": 1})

    def load(self, name: str):
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, model) -> torch.Tensor:
        return model(TOKENS).logits

    def of_peft(self) -> torch.Tensor:
        peft = pytest.importorskip("peft")
        return self.logits(peft.PeftModel.from_pretrained(self.load("original"), self.folder / "adapter"))


@pytest.mark.parametrize("row_norm", ["none", "pre"])
@pytest.mark.parametrize("family", DENSE + EXPERTS)
def test_an_adapter_of_rank_one_is_the_edit(family: str, row_norm: str, tmp_path: Path) -> None:
    made = Exported(family, tmp_path, row_norm)
    edited, original = made.logits(made.load("edited")), made.logits(made.load("original"))
    assert made.adapter.rank == 1 and made.adapter.exact and made.adapter.error == 0.0
    assert (edited - original).abs().max() > 1e-2
    assert (made.of_peft() - edited).abs().max() < 1e-5
    assert (made.worn_logits - edited).abs().max() < 1e-5


@pytest.mark.parametrize("family", ("llama", "gpt2", "phi3", *EXPERTS))
def test_an_adapter_is_read_back(family: str, tmp_path: Path) -> None:
    """Factors as they were, and added to the original's files the edit."""
    made = Exported(family, tmp_path, "pre")
    opened = open_model(ModelChoice(path=str(tmp_path / "original"), dtype="float32", device="cpu"))
    anatomy = find_anatomy(opened.skeleton())
    found = read_adapter(tmp_path / "adapter", anatomy, opened.skeleton())
    assert [each.writer.weight for each in found.writers] == [each.writer.weight for each in made.adapter.writers]
    for mine, theirs in zip(found.writers, made.adapter.writers, strict=True):
        for part, expected in zip(mine.parts, theirs.parts, strict=True):
            assert torch.equal(part.in_RK, expected.in_RK) and torch.equal(part.out_DR, expected.out_DR)
    merged = tmp_path / "merged"
    merged.mkdir()
    ablation = ablation_for(anatomy, "pre")
    MergedFiles.of(opened, anatomy, ablation, found, torch.float32).write(World(), merged, merged)
    link_companions(opened, merged)
    edited = made.logits(made.load("edited"))
    assert (made.logits(made.load("merged")) - edited).abs().max() < 1e-5
    assert (made.logits(made.load("original")) - edited).abs().max() > 1e-2


def test_an_adapter_that_cannot_be_read_back(tmp_path: Path) -> None:
    made = Exported("llama", tmp_path, "pre")
    anatomy, file = find_anatomy(made.loaded.model), tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({**whole, "other": torch.ones(1)}, file)
    with pytest.raises(UserError, match="holds other, which is no part of the model"):
        read_adapter(file.parent, anatomy, made.loaded.model)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        read_adapter(file.parent, anatomy, made.loaded.model)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_an_adapter_of_whole_rank_is_the_edit_that_keeps_norms(family: str, tmp_path: Path) -> None:
    made = Exported(family, tmp_path, "full")
    edited = made.logits(made.load("edited"))
    assert made.adapter.rank == 32 and made.adapter.error < 1e-7
    assert (made.of_peft() - edited).abs().max() < 1e-5
    assert (made.worn_logits - edited).abs().max() < 1e-5


@pytest.mark.parametrize("through_norm", [False, True])
def test_a_norm_behind_a_writer_acts_on_the_sum(through_norm: bool, tmp_path: Path) -> None:
    """Gemma 3: the direction differs with the norm, the adapter is exact either way."""
    made = Exported("gemma3", tmp_path, "pre", through_norm=through_norm)
    assert (made.of_peft() - made.logits(made.load("edited"))).abs().max() < 1e-5


def test_a_lower_rank_says_what_it_leaves_out(tmp_path: Path) -> None:
    adapters = [Exported("llama", tmp_path / str(rank), "full", rank) for rank in (1, 4)]
    errors = [made.adapter.error for made in adapters]
    assert 0.5 > errors[0] > errors[1] > 0.001 and not adapters[0].adapter.exact
    edited = adapters[0].logits(adapters[0].load("edited"))
    far = [(made.of_peft() - edited).abs().max() for made in adapters]
    assert far[0] > far[1] > 1e-5
    assert adapters[0].adapter.largest_error[0] >= errors[0]


@pytest.mark.parametrize("exact_below", [1024, 8])
def test_the_error_of_a_rank_is_that_of_the_best(exact_below: int, monkeypatch) -> None:
    """Against the singular values that were left out; by iteration nearly so."""
    monkeypatch.setattr(low_rank_module, "_EXACT_BELOW", exact_below)
    generator = torch.Generator().manual_seed(1)
    weight_DK = torch.randn(40, 56, generator=generator)
    direction_D = torch.nn.functional.normalize(torch.randn(40, generator=generator), dim=0)
    change_DK = edit_weight(weight_DK.double(), direction_D, 1.3, "full") - weight_DK
    values = torch.linalg.svdvals(change_DK)
    state = torch.random.get_rng_state()
    for rank in (1, 3, 40):
        part = low_rank_edit(weight_DK, direction_D, 1.3, "full", rank)
        rest = (change_DK - part.out_DR.double() @ part.in_RK.double()).square().sum().item()
        assert part.rank == rank and part.change == pytest.approx(values.square().sum().item())
        assert part.left_out == pytest.approx(rest, rel=1e-4, abs=1e-9)
        assert rest == pytest.approx(values[rank:].square().sum().item(), rel=1e-2, abs=1e-9)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss"])
def test_an_adapter_from_files_is_that_from_memory(family: str, tmp_path: Path) -> None:
    families.save(family, tmp_path)
    opened = open_model(ModelChoice(path=str(tmp_path)))
    loaded = load_weights(opened)
    anatomy = find_anatomy(loaded.model)
    skeleton, checkpoint = opened.empty_model(loaded.dtype)
    adapters = [
        make_adapter(anatomy, ablation_for(anatomy, "pre"), EDIT, read, 1)
        for read in (partial(resident_writer, loaded.model), partial(stored_writer, checkpoint))
    ]
    for name, adapter, model in zip(("memory", "files"), adapters, (loaded.model, skeleton), strict=True):
        write_adapter(tmp_path / name, adapter, model, "base")
    memory, files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("memory", "files"))
    assert memory.keys() == files.keys() and len(memory) >= 4
    assert all(torch.allclose(memory[name], files[name], rtol=1e-6, atol=1e-7) for name in memory)


def test_what_the_files_say(tmp_path: Path) -> None:
    made = Exported("gpt2", tmp_path, "none")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "heretic_ds.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 1 and config["fan_in_fan_out"] is True
    assert config["base_model_name_or_path"] == "original"
    assert "transformer.h.0.attn.c_proj" in config["target_modules"] and config["target_parameters"] is None
    assert isinstance(made.adapter, Adapter) and made.adapter.bytes == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    )
