"""FP8 and MXFP4 checkpoints, of which any part is read by itself: against transformers, which dequantises the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from heretic_ds.ablation import Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint import Checkpoint, TensorFiles, split
from heretic_ds.checkpoint.open import ModelChoice, OpenedModel, load_weights, open_model
from heretic_ds.checkpoint.outline import outline_model
from heretic_ds.checkpoint.packed import numbers as reading
from heretic_ds.checkpoint.packed import stored_bytes, unpacked_headers
from heretic_ds.checkpoint.source import read_headers
from heretic_ds.errors import UserError
from heretic_ds.export.checkpoint import export_model
from heretic_ds.export.streaming import EditedFiles
from heretic_ds.placements.costs import Resources
from heretic_ds.placements.fsdp import Fsdp
from heretic_ds.placements.tensor_parallel.sharding import expert_shards
from heretic_ds.placements.vllm import Vllm
from heretic_ds.planner import facts_of, machine_of
from heretic_ds.settings import conf_dir
from tests import packed
from tests.unit.test_streaming import random_ablation, tensors_of

CPU = torch.device("cpu")
EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.5)})
PROJECTION = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("llama")`: the folder of a tiny packed model."""
    known: dict[str, Path] = {}

    def of_family(family: str) -> Path:
        if family not in known:
            known[family] = packed.save(family, tmp_path_factory.mktemp(family))
        return known[family]

    return of_family


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch) -> None:
    """Tiny matrices are read in several parts too."""
    monkeypatch.setattr(reading, "_AT_ONCE", 200)


def opened(folder: Path, dtype: str = "auto") -> OpenedModel:
    return open_model(ModelChoice(path=str(folder), dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("family", packed.PACKED)
def test_a_loaded_model_is_the_one_that_transformers_dequantises(saved, family, dtype) -> None:
    loaded = load_weights(opened(saved(family), dtype))
    expected = packed.dequantised(saved(family), getattr(torch, dtype)).state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys() and loaded.quantization == packed.PACKED[family]
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert getattr(loaded.model.config, "quantization_config", None) is None


@pytest.mark.parametrize("member", [0, 1, 2])
@pytest.mark.parametrize("family", packed.PACKED)
def test_any_part_is_that_part_of_the_dequantised_whole(saved, family, member) -> None:
    """Along each dimension; 3 ranks' bounds are none of blocks."""
    model, checkpoint = opened(saved(family)).empty_model(torch.bfloat16)
    expected = packed.dequantised(saved(family)).state_dict()
    shards = expert_shards(model, find_anatomy(model), member, 3)
    for name, shape in checkpoint.shapes.items():
        parts = [split(shape, dim, member, 3) for dim in range(len(shape))]
        parts += [shards[name]] if name in shards else []
        for shard in parts:
            assert torch.equal(checkpoint.read(name, shard, CPU), shard.take(expected[name])), (name, shard)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_any_run_of_numbers_is_that_run(saved, family) -> None:
    files = TensorFiles(saved(family), opened(saved(family)).headers)
    for name, shape in files.shapes.items():
        whole = files.read(name).view(-1)
        width = shape[-1]
        for start, count in ((0, len(whole)), (1, width), (width - 1, 2 * width + 3), (len(whole) // 2, 5), (3, 1)):
            part = torch.empty(min(count, len(whole) - start), dtype=whole.dtype)
            files.read_numbers_into(name, part, start)
            assert torch.equal(part, whole[start : start + count]), (name, start, count)


def test_a_part_costs_the_reading_of_a_part(saved, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_AT_ONCE", 2**19)
    sizes: list[int] = []
    read = TensorFiles._read_box

    def counted(self: TensorFiles, info, width, rows, columns, into) -> None:
        sizes.append(into.numel())
        read(self, info, width, rows, columns, into)

    with mock.patch.object(TensorFiles, "_read_box", counted):
        files = TensorFiles(saved("gpt_oss"), opened(saved("gpt_oss")).headers)
        name = "model.layers.0.mlp.experts.gate_up_proj"
        experts, width, outputs = files.shapes[name]
        for dim, size in enumerate(files.shapes[name]):
            sizes.clear()
            shape = [experts, width, outputs]
            shape[dim] = size // 4
            files.read_into(name, torch.empty(shape), dim, 0, size // 4)
            codes = experts * width * outputs // 2 // 4
            scales = experts * outputs * width // 32 // (1 if dim == 1 else 4)
            assert sum(sizes) == codes + scales


def test_a_file_is_opened_once_a_part_and_closed_whatever_happens(saved, monkeypatch) -> None:
    files = TensorFiles(saved("gpt_oss"), opened(saved("gpt_oss")).headers)
    name, handles, at_path = "model.layers.0.mlp.experts.gate_up_proj", [], Path.open
    monkeypatch.setattr(Path, "open", lambda *given, **more: handles.append(at_path(*given, **more)) or handles[-1])
    target = torch.empty(files.shapes[name])
    files.read_into(name, target)
    files.read_numbers_into(name, target.view(-1))
    assert len(handles) == 2 and all(file.closed for file in handles)
    monkeypatch.setattr(reading, "_fp4_pairs", mock.Mock(side_effect=MemoryError))
    for _ in range(2):
        with pytest.raises(MemoryError):
            files.read_into(name, target)
    assert len(handles) == 4 and all(file.closed for file in handles)
    handles.clear()
    monkeypatch.undo()
    files.read_into(name, target)


# --- every form of scales -------------------------------------------------------------------------

_FORMS = {
    "of_a_tensor": ((), torch.float32),
    "in_brackets": ((1,), torch.bfloat16),
    "of_blocks": ((6, 4), torch.float32),
    "of_rows": ((48, 1), torch.float16),
    "in_eight_bits": ((48, 4), torch.float8_e8m0fnu),
    "as_exponents": ((48, 2), torch.uint8),
    "of_experts": ((3, 6, 4), torch.float32),
}


def _made(form: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype = _FORMS[form]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 48, 32, generator=generator) * 50
    powers = torch.randint(-6, 6, shape, generator=generator)
    scales = (powers + 127).to(dtype) if dtype == torch.uint8 else (2.0**powers).to(dtype)
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        scales = (torch.rand(shape, generator=generator) / 100).to(dtype)
    return (codes if len(shape) == 3 else codes[0]).to(torch.float8_e4m3fn), scales


def _files(folder: Path, stated: dict | None = None, **tensors: torch.Tensor) -> TensorFiles:
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, folder / "model.safetensors")
    raw = {"quantization_config": {"quant_method": "fp8", **(stated or {})}}
    return TensorFiles(folder, unpacked_headers(raw, read_headers(folder), folder))


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("form", _FORMS)
def test_scales_of_every_form(tmp_path, form, four_bits) -> None:
    codes, scales = _made(form)
    if four_bits:
        codes = torch.arange(codes.numel()).mul(37).to(torch.int8).view(codes.shape)
    name = "x__weight_scale_inv" if form != "of_blocks" else "x__scale"
    files = _files(tmp_path, x__weight=codes, **{name: scales})
    assert list(files.shapes) == ["x.weight"]
    for dtype in (torch.float32, torch.bfloat16):
        expected = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
        found = torch.empty_like(expected)
        files.read_into("x.weight", found)
        assert torch.equal(found, expected)
        for dim, size in enumerate(expected.shape):
            part = torch.empty_like(expected.narrow(dim, 1, size - 2))
            files.read_into("x.weight", part, dim, 1, size - 1)
            assert torch.equal(part, expected.narrow(dim, 1, size - 2))


@pytest.mark.parametrize("block", [(20, 12), (48, 31), (7, 33), (100, 100)])
def test_the_last_blocks_may_be_smaller(tmp_path, block) -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    codes, scales = packed.packed_fp8(weight, block)
    files = _files(tmp_path, {"weight_block_size": list(block)}, x__weight=codes, x__weight_scale_inv=scales)
    expected = codes.float() * packed.spread(scales, block, (48, 32))
    assert torch.equal(files.read("x.weight"), expected)
    for dim, size in ((0, 48), (1, 32)):
        for start, stop in ((3, size), (size - 1, size), (0, 21), (19, 22)):
            part = torch.empty_like(expected.narrow(dim, start, stop - start))
            files.read_into("x.weight", part, dim, start, stop)
            assert torch.equal(part, expected.narrow(dim, start, stop - start))


def test_every_code_under_every_exponent(tmp_path) -> None:
    """But for the last exponent, which stands for no number."""
    blocks = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255).to(torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    raw = {"quantization_config": {"quant_method": "mxfp4"}}
    files = TensorFiles(tmp_path, unpacked_headers(raw, read_headers(tmp_path), tmp_path))
    expected = convert_moe_packed_tensors(blocks, scales)
    for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32), (torch.float16, torch.int16)):
        found = torch.empty(1, 512, 255, dtype=dtype)
        files.read_into("x", found)
        assert torch.equal(found.view(bits), expected.to(dtype).view(bits))


_UNSTATED = {
    "two_of_128_and_64": ((192, 160), (128, 128)),
    "one_short_of_128": ((96, 160), (128, 128)),
    "equal_ones": ((192, 160), (64, 40)),
    "rows": ((192, 160), (1, 160)),
    "groups_of_rows": ((192, 160), (1, 32)),
}


@pytest.mark.parametrize("size", [{}, {"weight_block_size": None}])
@pytest.mark.parametrize("form", _UNSTATED)
def test_blocks_whose_size_is_not_stated_are_of_128_or_equal(tmp_path, form, size) -> None:
    shape, block = _UNSTATED[form]
    codes, scales = packed.packed_fp8(torch.randn(shape, generator=torch.Generator().manual_seed(0)), block)
    files = _files(tmp_path, size, x__weight=codes, x__weight_scale_inv=scales)
    assert torch.equal(files.read("x.weight"), codes.float() * packed.spread(scales, block, shape))


@pytest.mark.parametrize("shape", [(3, 2), (192,), (2, 3)])
def test_scales_that_give_no_size_of_blocks_are_refused(tmp_path, shape) -> None:
    """Rows with scales [D], which no library is known to write with this method, among them."""
    codes = torch.zeros(192, 160, dtype=torch.float8_e4m3fn)
    codes = codes[:191] if shape == (3, 2) else codes
    with pytest.raises(UserError, match=r"blocks of 128 by 128 or equal ones, where no weight_block_size is stated"):
        _files(tmp_path, x__weight=codes, x__weight_scale_inv=torch.ones(shape))
    stated = {"weight_block_size": [128, 64]}
    with pytest.raises(UserError, match=r"cannot be the scales of x.weight \[19\d, 160\] in F8_E4M3; "):
        _files(tmp_path, stated, x__weight=codes, x__weight_scale_inv=torch.ones(1, 9))


# --- what is damaged ------------------------------------------------------------------------------


def _refused(folder: Path, change=None, **stated) -> str:
    if change is not None:
        packed.rewrite(folder, change)
    if stated:
        config = json.loads((folder / "config.json").read_text())
        packed.state_packing(folder, **{**config["quantization_config"], **stated})
    with pytest.raises(UserError) as error:
        load_weights(opened(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_fp8_is_told_in_a_sentence(tmp_path) -> None:
    def folder(name: str) -> Path:
        return packed.save("llama", tmp_path / name)

    scale = f"{PROJECTION}_scale_inv"
    assert f"no file holds its scales ({scale})" in _refused(folder("lacks"), lambda found: found.pop(scale))
    for name, other in {
        "turned": lambda old: old.T,
        "wide": lambda old: torch.cat([old, old], 1),
        "flat": lambda old: old.view(-1),
        "whole": lambda old: old.int(),
        "coarse": lambda old: old[:4, :3],
        "empty": lambda old: old[:0],
    }.items():
        said = _refused(folder(name), lambda found, other=other: found.update({scale: other(found[scale])}))
        assert f"{scale} [" in said and f"cannot be the scales of {PROJECTION} [32, 48] in F8_E4M3" in said
    said = _refused(folder("nan"), lambda found: found[PROJECTION].view(torch.uint8)[3].fill_(0x7F))
    assert f"tensor {PROJECTION} of the checkpoint holds NaN or infinite numbers" in said
    said = _refused(folder("infinite"), lambda found: found[scale].fill_(torch.inf))
    assert f"tensor {PROJECTION} of the checkpoint holds NaN or infinite numbers" in said
    said = _refused(folder("gone"), lambda found: found.pop(PROJECTION))
    assert f"lack {PROJECTION}" in said
    for size in ("x", [8], [8, 0], [8, True], [8, 1.5], 3, {}):
        assert "expected two whole numbers" in _refused(folder("size"), weight_block_size=size)


def test_damaged_mxfp4_is_told_in_a_sentence(tmp_path) -> None:
    def folder(name: str) -> Path:
        return packed.save("gpt_oss", tmp_path / name)

    name = "model.layers.1.mlp.experts.down_proj"
    scales = f"{name}_scales"
    assert f"no file holds its scales ({scales})" in _refused(folder("lacks"), lambda found: found.pop(scales))
    said = _refused(folder("cut"), lambda found: found.update({scales: found[scales][:, :-1]}))
    assert f"{scales} [4, 31, 2] in U8 cannot be the scales of {name}_blocks [4, 32, 2, 16]" in said
    said = _refused(folder("flat"), lambda found: found.update({f"{name}_blocks": found[f"{name}_blocks"][0]}))
    assert "cannot be the scales of" in said
    said = _refused(folder("nan"), lambda found: found[scales].fill_(255))
    assert f"tensor {name} of the checkpoint holds NaN" in said
    assert f"lack {name}" in _refused(folder("gone"), lambda found: found.pop(f"{name}_blocks"))


# --- plans and exports ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", packed.PACKED)
def test_a_plan_knows_the_size_in_memory_and_in_files(saved, family) -> None:
    outline = outline_model(ModelChoice(str(saved(family))), CPU)
    headers, model = outline.headers, outline.checked_skeleton()
    assert {name: info.shape for name, info in headers.items()} == {
        name: info.shape for name, info in opened(saved(family)).headers.items()
    }
    Checkpoint.of(model, TensorFiles(saved(family), headers), torch.bfloat16)
    there = sum(tensor.nbytes for tensor in load_file(saved(family) / "model.safetensors").values())
    assert stored_bytes(headers) == there < sum(p.nbytes for p in model.parameters())


_SERVING = {
    "llama": ("replicated.Replicated", "tensor_parallel.TensorParallel", "fsdp.Fsdp", "pipeline.Pipeline"),
    "qwen3_moe": ("expert_parallel.ExpertParallel", "zero3.Zero3"),
    "gpt_oss": ("tensor_pipeline.TensorPipeline", "fsdp.Fsdp"),
}


@pytest.mark.parametrize("family", _SERVING)
def test_a_packed_checkpoint_is_planned_as_the_dequantised_but_for_reading(
    saved, tmp_path, compose_settings, family
) -> None:
    there, settings = saved(family), compose_settings()
    facts = []
    for folder in (there, packed.save_dequantised(there, tmp_path)):
        outline = outline_model(ModelChoice(str(folder)), CPU)
        facts.append(facts_of(outline, find_anatomy(outline.skeleton()), settings))
    assert facts[0].weights == facts[1].weights and facts[1].stored == 0 < facts[0].stored < facts[0].weights
    slow_disk = replace(machine_of(OmegaConf.load(conf_dir() / "hardware" / "h100x8.yaml")), disk_bandwidth=1e3)
    for name in _SERVING[family]:
        kind = get_class(f"heretic_ds.placements.{name}")
        phase = "capture" if "zero3" in name else "evaluate"
        costs = [
            kind(phase, kind.Options()).cost(each, Resources(slow_disk, 4 if "tensor_pipe" in name else 2))
            for each in facts
        ]
        assert costs[0].bytes == costs[1].bytes and costs[0].host == costs[1].host
        assert costs[0].seconds["load"] < costs[1].seconds["load"]
    with pytest.raises(
        UserError, match=r"quantised with .*, of which this evaluate reads no weights; .* evaluate=replicated"
    ):
        Vllm("evaluate", Vllm.Options()).cost(facts[0], Resources(slow_disk, 2))
    with pytest.raises(UserError, match="compressed-tensors, and its parts cannot be read by themselves"):
        Fsdp("evaluate", Fsdp.Options()).cost(
            replace(facts[0], quantization="compressed-tensors"), Resources(slow_disk, 2)
        )


def _add_head(folder: Path, plain: Path) -> tuple[str, ...]:
    """Give a packed checkpoint and its dequantised copy a head that predicts further tokens; returns its tensors."""
    norm, weight = torch.randn(32).bfloat16(), torch.randn(32, 48)
    codes, scales = packed.packed_fp8(weight, packed.BLOCK)
    whole = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    in_fp8 = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    head = {"mtp.proj.weight": codes, "mtp.proj.weight_scale_inv": scales} if in_fp8 else {"mtp.proj.weight": whole}
    packed.rewrite(folder, lambda found: found.update({"mtp.norm.weight": norm, **head}))
    packed.rewrite(plain, lambda found: found.update({"mtp.norm.weight": norm, "mtp.proj.weight": whole}))
    return "mtp.norm.weight", "mtp.proj.weight"


@pytest.mark.parametrize("family", packed.PACKED)
def test_files_are_edited_unpacked(saved, tmp_path, family) -> None:
    """As those of the checkpoint that transformers dequantises; what is no part of the model comes along."""
    folder = tmp_path / "packed"
    packed.save(family, folder)
    plain = packed.save_dequantised(folder, tmp_path / "plain")
    extra = _add_head(folder, plain)
    written = {}
    for place in (folder, plain):
        model = opened(place)
        anatomy = find_anatomy(model.skeleton())
        described, weights = EditedFiles.plan(model, anatomy, random_ablation(anatomy, "full"), EDIT, torch.bfloat16)
        result = export_model(described, tmp_path / "out" / place.name, "card", {"schema": 1}, weights=weights)
        assert result.carried == extra
        written[place.name] = tensors_of(result.folder)
    assert written["packed"].keys() == written["plain"].keys()
    assert all(torch.equal(tensor, written["plain"][name]) for name, tensor in written["packed"].items())
    config = json.loads((tmp_path / "out" / "packed" / "config.json").read_text())
    assert "quantization_config" not in config
    assert load_weights(opened(tmp_path / "out" / "packed")).quantization is None


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_in_memory_is_exported_unpacked(tmp_path, family) -> None:
    folder = packed.save(family, tmp_path / "packed")
    plain = packed.save_dequantised(folder, tmp_path / "plain")
    extra = _add_head(folder, plain)
    result = export_model(load_weights(opened(folder)), tmp_path / "out", "card", {"schema": 1})
    written, expected = tensors_of(tmp_path / "out"), tensors_of(plain)
    assert written.keys() == expected.keys() == opened(folder).headers.keys() and result.carried == extra
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
