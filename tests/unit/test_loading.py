"""Loading: what is refused before weights are read, what is checked afterwards, and dtype fallbacks."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_ds.checkpoint import fitness as model_fitness
from heretic_ds.checkpoint import open as loading
from heretic_ds.checkpoint.fitness import choose_device, dtype_candidates, first_non_finite
from heretic_ds.checkpoint.open import LoadedModel, ModelChoice, load_weights, open_model
from heretic_ds.checkpoint.source import read_headers, resolve_source
from heretic_ds.errors import UserError
from tests import families

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def load(folder: Path | str, **settings) -> LoadedModel:
    return load_weights(open_model(ModelChoice(path=str(folder), device="cpu", **settings)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return families.save("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, size: str = "20KB") -> list[Path]:
    families.build("llama").save_pretrained(folder, max_shard_size=size)
    (folder / "model.safetensors").unlink()
    return sorted(folder.glob("model-*.safetensors"))


def test_a_model_is_loaded_whole_frozen_and_greedy(copy: Path) -> None:
    edit_json(copy / "generation_config.json", do_sample=True, temperature=0.6, eos_token_id=[5, 2])
    loaded = load(copy)
    expected = load_file(copy / "model.safetensors")
    state = loaded.model.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.model_name, loaded.source, loaded.is_hub) == ("copy", copy, False)
    assert loaded.dtype == torch.float32 and loaded.model.device == CPU and loaded.processor is None
    generation = loaded.model.generation_config
    assert not generation.do_sample and generation.temperature is None
    assert generation.eos_token_id == [5, 2] and generation.pad_token_id == families.PAD
    assert loaded.tokenizer.padding_side == "left"


@pytest.mark.parametrize("family", families.REQUIRED)
def test_every_family_passes_the_checks(family: str, tmp_path: Path) -> None:
    folder = families.save(family, tmp_path / family, dtype=torch.bfloat16)
    loaded = load(folder)
    assert loaded.dtype == torch.bfloat16
    built = json.loads((folder / "config.json").read_text())["architectures"]
    assert [type(loaded.model).__name__] == built


# --- refused before weights are read --------------------------------------------------------------


@pytest.fixture
def no_weights_read(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "_load_weights", refuse)


def refusal(folder: Path | str, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("no_weights_read")
class TestRefusedEarly:
    def test_missing_folder(self, tmp_path: Path) -> None:
        assert "there is no such folder" in refusal(tmp_path / "nothing")
        assert "model.path=./nothing" in refusal("./nothing")

    def test_file_instead_of_folder(self, copy: Path) -> None:
        assert "is a file" in refusal(copy / "config.json")

    def test_hub_model_that_cannot_be_reached(self) -> None:
        message = refusal("nobody/no-such-model")
        assert "model.path=nobody/no-such-model" in message and "hub" in message

    def test_folder_without_configuration(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        assert "no config.json" in refusal(copy)
        (copy / "adapter_config.json").write_text("{}")
        assert "adapter" in refusal(copy)

    def test_broken_configuration(self, copy: Path) -> None:
        (copy / "config.json").write_text("{")
        assert "config.json cannot be read as JSON" in refusal(copy)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        assert "no weights" in refusal(copy)

    @pytest.mark.parametrize("keep", [0, 4, 500, -1])
    def test_truncated_weights(self, copy: Path, keep: int) -> None:
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        message = refusal(copy)
        assert str(file) in message and "truncated or corrupt" in message

    def test_git_lfs_pointer(self, copy: Path) -> None:
        (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "Git LFS pointer" in refusal(copy)

    def test_missing_and_truncated_shard(self, copy: Path) -> None:
        shards = shard(copy)
        assert len(shards) > 2
        content = shards[1].read_bytes()
        shards[1].write_bytes(content[:-1])
        assert str(shards[1]) in refusal(copy)
        shards[1].unlink()
        message = refusal(copy)
        assert str(shards[1]) in message and "1 of the" in message

    def test_index_that_disagrees_with_its_files(self, copy: Path) -> None:
        shards = shard(copy)
        shutil.copyfile(shards[0], shards[1])
        assert "has no tensor" in refusal(copy)

    def test_unknown_architecture(self, copy: Path) -> None:
        edit_json(copy / "config.json", model_type="llama99")
        assert "llama99" in refusal(copy)

    def test_remote_code_needs_trust(self, copy: Path) -> None:
        own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        edit_json(copy / "config.json", model_type="own", auto_map=own)
        assert "model.trust_remote_code=true" in refusal(copy)

    @pytest.mark.parametrize(
        ("model_type", "architecture"),
        [
            ("t5", "T5ForConditionalGeneration"),
            ("bert", "BertForMaskedLM"),
            ("vit", "ViTForImageClassification"),
        ],
    )
    def test_not_a_causal_language_model(self, copy: Path, model_type: str, architecture: str) -> None:
        (copy / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
        message = refusal(copy)
        assert architecture in message and "causal" in message

    def test_quantised_in_a_way_that_cannot_be_undone(self, copy: Path, monkeypatch) -> None:
        monkeypatch.undo()
        edit_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        assert "quantised with gptq" in refusal(copy)

    def test_no_tokenizer(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        assert "tokenizer" in refusal(copy)
        (copy / "tokenizer_config.json").unlink()
        assert "no tokenizer files" in refusal(copy)

    def test_unknown_dtype_and_device(self, copy: Path) -> None:
        assert "model.dtype=int4" in refusal(copy, dtype="int4")
        for name in ("gpu", "cuda:99"):
            with pytest.raises(UserError, match=f"model.device={name}"):
                choose_device(name)


def test_auto_is_cuda_or_the_cpu_and_no_other_accelerator(monkeypatch) -> None:
    apple = {"is_available": lambda: True, "device_count": lambda: 1, "current_device_index": lambda: 0}
    for name, stand_in in (apple | {"current_accelerator": lambda *_: torch.device("mps")}).items():
        monkeypatch.setattr(torch.accelerator, name, stand_in)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"model\.device=mps: 0 such devices are usable"):
        choose_device("mps")
    cuda = {"is_available": lambda: True, "device_count": lambda: 2, "current_device": lambda: 1}
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cuda:0") == torch.device("cuda:0")


# --- checked on the loaded weights ----------------------------------------------------------------


def test_missing_tensors_are_named_and_never_left_random(copy: Path) -> None:
    edit_weights(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(copy)
    assert "model.layers.1.mlp.up_proj.weight" in message and "LlamaForCausalLM" in message


def test_the_models_device_becomes_the_current_one(copy: Path, monkeypatch) -> None:
    """Once it is known that there is a model: kernels that are no operators of PyTorch run on the current device."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    open_model(ModelChoice(path=str(copy), device="cpu"))
    assert chosen == []
    monkeypatch.setattr(loading, "choose_device", lambda name: torch.device(name))
    assert open_model(ModelChoice(path=str(copy), device="cuda:1")).device == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


def test_tied_embeddings_are_not_missing(tmp_path: Path) -> None:
    folder = families.save("gpt2", tmp_path / "gpt2")
    assert "lm_head.weight" not in read_headers(folder)
    model = load(folder).model
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_named(copy: Path, bad: float) -> None:
    edit_weights(copy, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"][3].fill_(bad))
    assert "model.layers.1.self_attn.o_proj.weight" in refusal(copy)


def test_buffers_are_checked_too(llama: Path) -> None:
    model = load(llama).model
    assert first_non_finite(model) is None
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_buffer("table", torch.tensor([]))
    assert first_non_finite(model) is None
    model.mask[0] = math.nan
    assert first_non_finite(model) == "mask"


def test_shapes_that_do_not_fit_the_configuration(copy: Path) -> None:
    edit_json(copy / "config.json", intermediate_size=32)
    assert "cannot be loaded" in refusal(copy)


# --- dtypes ---------------------------------------------------------------------------------------


def test_dtype_candidates(monkeypatch) -> None:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    assert dtype_candidates("auto", bf16, CPU) == [bf16, f32]
    assert dtype_candidates("auto", f32, CPU) == [f32]
    assert dtype_candidates("float16", f32, CPU) == [f16]
    assert dtype_candidates("auto", f16, CPU, parameters=1000) == [f32, bf16]
    assert dtype_candidates("auto", f16, CPU, parameters=10**15) == [bf16]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert dtype_candidates("auto", bf16, GPU) == [f16, f32]
    assert dtype_candidates("auto", f16, GPU) == [f16, f32]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert dtype_candidates("auto", bf16, GPU) == [bf16, f32]


def test_auto_takes_the_tensors_dtype_where_the_configuration_is_silent(tmp_path: Path) -> None:
    folder = families.save("llama", tmp_path / "bf16", dtype=torch.bfloat16)
    edit_json(folder / "config.json", dtype=None)
    assert load(folder).dtype == torch.bfloat16
    assert load(folder, dtype="float32").dtype == torch.float32


def test_a_dtype_that_overflows_falls_back(copy: Path, monkeypatch, caplog) -> None:
    """As on a GPU without bfloat16: float16 cannot hold 1e5, float32 can."""
    edit_weights(copy, lambda tensors: tensors["model.embed_tokens.weight"][0, 0].fill_(1e5))
    monkeypatch.setattr(loading, "dtype_candidates", lambda *args: [torch.float16, torch.float32])
    with caplog.at_level(logging.WARNING):
        loaded = load(copy)
    assert loaded.dtype == torch.float32
    assert "model.embed_tokens.weight" in caplog.text and "float32 instead" in caplog.text


@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_forward_that_fails_falls_back_or_is_reported(llama: Path, monkeypatch, caplog, failure: str) -> None:
    def forward_problem(model):
        return None if model.dtype == torch.float32 else problem(model)

    def broken(**inputs):
        if failure == "raises":
            raise RuntimeError("not implemented for 'BFloat16'")
        return original(**inputs) | {"logits": torch.full((1, 8, 4), math.nan)}

    def problem(model):
        nonlocal original
        original = model.forward
        model.forward = broken
        return model_fitness.forward_problem(model)

    original = None
    monkeypatch.setattr(loading, "forward_problem", forward_problem)
    monkeypatch.setattr(loading, "own_dtype", lambda *args: torch.bfloat16)
    assert load(llama).dtype == torch.float32
    assert "float32 instead" in caplog.text
    assert "model.dtype" in refusal(llama, dtype="bfloat16")


# --- tokenizers and wrappers ----------------------------------------------------------------------


def test_padding_token_falls_back(copy: Path) -> None:
    edit_json(copy / "tokenizer_config.json", pad_token=None)
    assert load(copy).tokenizer.pad_token == "<eos>"
    edit_json(copy / "tokenizer_config.json", eos_token=None)
    assert load(copy).tokenizer.pad_token == "<unk>"
    edit_json(copy / "tokenizer_config.json", unk_token=None)
    assert load(copy).tokenizer.pad_token_id == 0


def test_a_wrapper_keeps_its_vision_tower(tmp_path: Path) -> None:
    folder = families.save("llava", tmp_path / "llava")
    names = {name for name, _ in load(folder).model.named_parameters()}
    assert any("vision" in name for name in names)


def test_mxfp4_checkpoint_is_dequantised(tmp_path: Path) -> None:
    folder = quantised_gpt_oss(tmp_path / "gpt-oss")
    loaded = load(folder)
    assert loaded.quantization == "mxfp4"
    experts = loaded.model.model.layers[0].mlp.experts
    assert experts.down_proj.dtype == torch.bfloat16 and experts.down_proj.shape == (4, 32, 32)
    assert set(experts.down_proj.unique().tolist()) <= {
        s * v / 8 for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    }
    assert getattr(loaded.model.config, "quantization_config", None) is None


def quantised_gpt_oss(folder: Path) -> Path:
    """A gpt-oss checkpoint with experts in MXFP4: 4-bit codes, two a byte, one exponent for 32."""
    families.FAMILIES["gpt_oss_32"] = families._usual(
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=4,
        intermediate_size=32,
    )
    families.save("gpt_oss_32", folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inner, outer = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), generator=generator)
            tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
            tensors[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 124, dtype=torch.uint8)

    edit_weights(folder, pack)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return folder


def test_a_hub_model_is_found_in_the_cache(llama: Path, tmp_path: Path, monkeypatch) -> None:
    """Without a network, a cached snapshot serves; its commit is the revision."""
    cache = tmp_path / "hub" / "models--owner--tiny"
    commit = "a" * 40
    shutil.copytree(llama, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = resolve_source("owner/tiny")
    assert (source.name, source.revision, source.is_hub) == ("owner/tiny", commit, True)
    assert (source.folder / "model.safetensors").exists()
