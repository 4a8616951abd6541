"""Parts of weights straight from files: every family's parts against transformers' own loading, and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint import Checkpoint, Shard, TensorFiles, fill, parameters_on_meta, split
from heretic_ds.checkpoint.open import ModelChoice, open_model
from heretic_ds.checkpoint.source import read_headers
from heretic_ds.errors import UserError
from heretic_ds.placements.tensor_parallel.sharding import expert_shards
from tests import families

CPU = torch.device("cpu")


def open_family(family: str, folder: Path, dtype: str = "float32"):
    families.save(family, folder)
    return open_model(ModelChoice(path=str(folder), dtype=dtype, device="cpu"))


def checkpoint_of(opened, dtype=torch.float32):
    model = opened.skeleton()
    return model, Checkpoint.of(model, TensorFiles(opened.source.folder, opened.headers), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", families.REQUIRED)
def test_a_filled_skeleton_is_the_loaded_model(family, dtype, tmp_path):
    opened = open_family(family, tmp_path, str(dtype).removeprefix("torch."))
    model, checkpoint = checkpoint_of(opened, dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    fill(model, checkpoint, {}, CPU)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    expected = dict(loaded.named_parameters(remove_duplicate=False)) | dict(loaded.named_buffers())
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # buffers that no file holds are among these
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert len(list(model.parameters())) == len(list(loaded.parameters())), "tied parameters came apart"


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_parts_along_every_dimension_are_parts_of_the_whole(family, member, tmp_path):
    opened = open_family(family, tmp_path)
    model, checkpoint = checkpoint_of(opened)
    shards = expert_shards(model, find_anatomy(model), member, 3)
    for name, shape in checkpoint.shapes.items():
        whole = checkpoint.read(name, checkpoint.whole(name), CPU)
        parts = [split(shape, dim, member, 3) for dim in range(len(shape))]
        parts += [shards[name]] if name in shards else []
        for shard in parts:
            assert torch.equal(checkpoint.read(name, shard, CPU), shard.take(whole)), (name, shard)


TRANSPOSED = tuple(f"model.language_model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))


def save_transposed_experts(folder: Path) -> PreTrainedModel:
    """Write a Qwen3-VL whose experts lie transposed in files: whether they do is told from the shape of the whole
    parameter, so that only a conversion can make it."""
    text = families.EXTRA["qwen2_moe"]().to_dict() | {"model_type": "qwen3_vl_moe_text", "num_experts": 4}
    text |= {"moe_intermediate_size": 24, "rope_parameters": families._SECTIONED_ROPE, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    )
    families.randomise(model)
    model.save_pretrained(folder)

    def transpose(tensors):
        for key in TRANSPOSED:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()

    rewrite(folder, transpose)
    return model


def test_what_only_a_conversion_can_make_is_converted_whole_and_then_parted(tmp_path):
    model, (name, other) = save_transposed_experts(tmp_path), TRANSPOSED
    whole = model.get_parameter(name)
    with parameters_on_meta():
        empty = AutoModelForImageTextToText.from_config(model.config)
    checkpoint = Checkpoint.of(empty, TensorFiles(tmp_path, read_headers(tmp_path)), torch.float32)
    shard = split(whole.shape, -1, 1, 2)
    fill(empty, checkpoint, {name: shard}, CPU)
    assert torch.equal(empty.get_parameter(name), shard.take(whole))
    assert torch.equal(empty.get_parameter(other), model.get_parameter(other))


def test_tied_weights_stay_one_parameter_where_their_parts_agree(tmp_path):
    opened = open_family("gemma2", tmp_path)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    model, checkpoint = checkpoint_of(opened)
    part = split(checkpoint.shapes[embedding], 0, 1, 2)
    fill(model, checkpoint, {embedding: part, head: part}, CPU)
    assert model.get_parameter(embedding) is model.get_parameter(head)
    model, checkpoint = checkpoint_of(opened)
    fill(model, checkpoint, {embedding: part, head: split(checkpoint.shapes[head], 1, 1, 2)}, CPU)
    assert model.get_parameter(embedding).shape != model.get_parameter(head).shape


def test_parameters_that_have_memory_are_filled_where_they_lie(tmp_path):
    opened = open_family("llama", tmp_path)
    model, checkpoint = checkpoint_of(opened)
    norm = torch.nn.Parameter(torch.empty(checkpoint.shapes["model.norm.weight"]))
    model.model.norm.weight = norm
    fill(model, checkpoint, {}, CPU)
    assert model.model.norm.weight is norm
    assert torch.equal(norm, load_file(tmp_path / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize(
    "shape", [(), (5,), (7, 3), (4, 600, 40), (3, 2, 40_000)], ids=["scalar", "vector", "matrix", "rows", "runs"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_reading_any_range_gives_that_range(shape, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("heretic_ds.checkpoint.files._BUFFER_BYTES", 2**16)
    tensor = torch.randn(shape).mul(100).to(dtype)
    save_file({"other": torch.ones(3), "tensor": tensor}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, read_headers(tmp_path))
    assert torch.equal(files.read("tensor"), tensor)
    for dim, size in enumerate(shape):
        for start, stop in ((0, size), (1, size), (size // 2, size // 2 + 1), (0, 0)):
            expected = tensor.narrow(dim, start, stop - start)
            for wanted in (dtype, torch.float64):
                for target in (
                    torch.empty(expected.shape, dtype=wanted),
                    torch.empty(*expected.shape, 2, dtype=wanted),
                ):
                    target = target[..., 0] if target.dim() > expected.dim() else target  # with holes between numbers
                    files.read_into("tensor", target, dim, start, stop)
                    assert torch.equal(target, expected.to(wanted))


def test_several_files_are_read_as_one_checkpoint(tmp_path):
    model = families.build("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    families.tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    empty, checkpoint = checkpoint_of(open_model(ModelChoice(path=str(tmp_path), device="cpu")))
    fill(empty, checkpoint, {}, CPU)
    assert all(torch.equal(t, empty.state_dict()[name]) for name, t in model.state_dict().items())


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_lacking_tensor_is_named(tmp_path):
    opened = open_family("mixtral", tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    opened.headers = read_headers(tmp_path)
    with pytest.raises(UserError, match=r"do not make up model.layers.1.mlp.experts.down_proj"):
        checkpoint_of(opened)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    opened.headers = read_headers(tmp_path)
    rewrite(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".1.block_sparse_moe" in key])
    opened.headers = read_headers(tmp_path)
    with pytest.raises(UserError, match=r"lack .*down_proj"):
        checkpoint_of(opened)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    opened = open_family("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    opened.headers = read_headers(tmp_path)
    with pytest.raises(UserError, match=r"model.norm.weight, which has the shape \[32\]"):
        checkpoint_of(opened)


def test_numbers_that_are_not_finite_are_named(tmp_path):
    opened = open_family("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[3].fill_(torch.inf))
    model, checkpoint = checkpoint_of(opened)
    with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj.weight .* NaN or infinite"):
        fill(model, checkpoint, {}, CPU)


def test_a_file_that_ends_too_early_is_named(tmp_path):
    opened = open_family("llama", tmp_path)
    model, checkpoint = checkpoint_of(opened)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match="ends too early"):
        fill(model, checkpoint, {}, CPU)


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="no safetensors weights"):
        TensorFiles(tmp_path, {})


def test_a_zeroed_part_is_zero(tmp_path):
    _, checkpoint = checkpoint_of(open_family("llama", tmp_path))
    shape = checkpoint.shapes["model.norm.weight"]
    assert not checkpoint.read("model.norm.weight", Shard(shape, zeroed=True), CPU).any()
    assert checkpoint.read("model.norm.weight", Shard(shape), CPU).any()


def test_nothing_stays_patched_and_large_tensors_get_no_memory():
    original = torch.nn.Module.register_parameter
    with parameters_on_meta():
        layer = torch.nn.Linear(3, 4)
        layer.register_buffer("kept", torch.arange(3))
        assert torch.zeros(2**13, 2**12).is_meta and not torch.zeros(5).is_meta
    assert torch.nn.Module.register_parameter is original
    assert layer.weight.is_meta and layer.kept.tolist() == [0, 1, 2]
    assert not torch.nn.Linear(3, 4).weight.is_meta


def test_a_file_with_an_unknown_dtype_is_refused(tmp_path):
    save_file({"tensor": torch.ones(3)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    odd = {"odd": {"dtype": "F4", "shape": [2], "data_offsets": [12, 13]}}
    header = json.dumps(json.loads(data[8 : 8 + size]) | odd)
    content = len(header).to_bytes(8, "little") + header.encode() + data[8 + size :] + b"0"
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="dtype F4"):
        TensorFiles(tmp_path, read_headers(tmp_path))
