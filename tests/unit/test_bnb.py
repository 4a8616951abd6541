"""Weights that bitsandbytes has packed: read as matrices, edited by outputs, reckoned with, refused where they cannot
be served."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import heretic_ds as hd
from heretic_ds.ablation import Ablation, Edit, Profile
from heretic_ds.anatomy import find_anatomy, is_packed, packed_modules, scales, unpacked
from heretic_ds.checkpoint import TensorFiles, as_if_not_packed, bnb
from heretic_ds.checkpoint.open import LoadedModel, ModelChoice, load_weights, open_model
from heretic_ds.checkpoint.source import read_headers
from heretic_ds.edits import packed as packed_edits
from heretic_ds.edits.outputs import DenseEdit
from heretic_ds.edits.packed import PackedEditor, editor_of
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.needs import check_bitsandbytes
from heretic_ds.placements.costs import Work
from heretic_ds.placements.costs.facts import Facts
from heretic_ds.prompts import pad_left
from heretic_ds.runner.engine import Runner, RunnerOptions
from heretic_ds.settings import Settings
from heretic_ds.stages.sharing.packing import how_edited
from heretic_ds.world import World
from tests import families
from tests.bnb import PACKED, config, needs_bnb, save_packed, tiny

FAMILIES = ("llama", "gpt2", "gemma3", "mixtral")
PROMPTS = [[5, 9, 40, 12, 33], [7, 8], [60, 3, 21]]
EDITS = [Edit(None, {"attention": Profile(1.1, 1.0, 0.3, 2.0), "mlp": Profile(0.8, 0.0, 0.2, 2.0)}), Edit(0.4, {
    "attention": Profile(0.6, 0.0, 0.6, 2.0), "mlp": Profile(1.2, 1.0, 0.9, 2.0)})]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def loaded(folder: Path, family: str, quantization: str = "none", width: int = 128) -> LoadedModel:
    path = tiny(family, folder / f"{family}-{width}", width)
    return load_weights(open_model(ModelChoice(str(path), dtype="float32", quantization=quantization)))


def runner(whole: LoadedModel) -> Runner:
    return Runner(whole.model, find_anatomy(whole.model), whole.tokenizer, RunnerOptions(batch_size=8))


def ablation(whole: LoadedModel, row_norm: str, rank: int = 1) -> Ablation:
    anatomy, generator = find_anatomy(whole.model), torch.Generator().manual_seed(3)
    shape = (anatomy.n_blocks + 1, rank, anatomy.width)
    directions = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64).mT)[0].mT
    return Ablation(directions.contiguous(), row_norm, False)


def plain_twin(folder: Path, family: str, whole: LoadedModel) -> LoadedModel:
    """The model without packing, its weights those that the packed ones stand for."""
    twin = loaded(folder, family)
    for name, module in packed_modules(whole.model):
        there: Any = twin.model.get_submodule(name)
        matrix_DK = unpacked(module)
        there.weight.data.copy_(
            matrix_DK if there.weight.shape == matrix_DK.shape and family != "gpt2" else matrix_DK.T
        )
    return twin


def batch() -> dict[str, Tensor]:
    rows = pad_left(PROMPTS, 0)
    names = {"input_ids": rows.input_ids_BS, "attention_mask": rows.attention_mask_BS}
    return names | {"position_ids": rows.position_ids_BS}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**batch()).logits[:, -1]


@needs_bnb
@pytest.mark.parametrize("quantization", PACKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_writers_of_packed_weights_have_their_true_shapes(family: str, quantization: str, folder: Path) -> None:
    packed, plain = loaded(folder, family, quantization), loaded(folder, family)
    ours, theirs = find_anatomy(packed.model).writers, find_anatomy(plain.model).writers
    assert [(w.weight, w.experts) for w in ours] == [(w.weight, w.experts) for w in theirs]
    count = 0
    for writer, original in zip(ours, theirs, strict=True):
        matrix, exact = writer.numbers_DK(packed.model), original.weight_DK(plain.model)
        assert matrix.shape == exact.shape
        if is_packed(packed.model.get_submodule(writer.module)):
            count += 1
            assert 0 < (matrix - exact).abs().max() < 0.2 * exact.abs().max()
            with pytest.raises(UserError, match="cannot be edited in place"):
                writer.weight_DK(packed.model)
    assert count >= 2
    assert next(packed.model.parameters()).dtype == torch.float32


@needs_bnb
@pytest.mark.parametrize("quantization", PACKED)
def test_residuals_are_those_of_a_model_that_transformers_packs(quantization: str, folder: Path) -> None:
    whole = loaded(folder, "llama", quantization)
    means_LD = runner(whole).capture(PROMPTS)
    path = tiny("llama", folder / "llama-128", 128)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config(quantization), dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    for _, module in packed_modules(theirs):
        module.support_avx512bf16_for_cpu = False  # where it computes in bfloat16 whatever the dtype
    with torch.no_grad():
        found = theirs(**batch(), output_hidden_states=True)
    expected_LD = torch.stack([state[:, -1].double().mean(0) for state in found.hidden_states])
    assert torch.allclose(means_LD, expected_LD, rtol=0, atol=1e-5 if quantization == "bnb_4bit" else 2e-2)


@needs_bnb
@pytest.mark.parametrize("row_norm", ["none", "pre", "full"])
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(each, marks=pytest.mark.thorough) for each in FAMILIES[1:])]
)
def test_edits_of_packed_outputs_are_those_of_the_matrices(family: str, row_norm: str, folder: Path) -> None:
    """One edit worn by the model, and several in one pass, beside really edited weights."""
    packed = loaded(folder, family, "bnb_4bit")
    twin, form = plain_twin(folder, family, packed), ablation(packed, row_norm)
    original = logits(packed.model)
    assert torch.allclose(original, logits(twin.model), atol=1e-4)
    kept = {name: module.weight.data.clone() for name, module in packed_modules(packed.model)}
    editor, in_place = (editor_of(each.model, find_anatomy(each.model)) for each in (packed, twin))
    assert isinstance(editor, PackedEditor) and type(in_place) is WeightEditor
    engine = runner(packed)
    for each in (editor, in_place, engine):
        each.prepare(form)
    expected = []
    for edit in EDITS:
        editor.set_edit(edit)
        in_place.set_edit(edit)
        expected.append(logits(twin.model))
        assert (expected[-1] - original).abs().max() > 0.05
        assert torch.allclose(logits(packed.model), expected[-1], atol=2e-4), row_norm
    editor.set_edit(None)
    assert logits(packed.model).equal(original)

    def value(at: Any, rows: Any) -> list[float]:
        return [float(row[-1][7]) for row in rows]

    alone = [engine.distributions(PROMPTS, [edit], value)[0] for edit in EDITS]
    engine.apply(EDITS[0])  # what is applied is put off while others are scored
    together = engine.distributions(PROMPTS, EDITS, value)
    for edit, exact in enumerate(expected):
        for row in (alone[edit], together[edit]):
            assert torch.allclose(torch.tensor(row), exact[:, 7], atol=2e-4)
    assert engine.distributions(PROMPTS, [None], value)[0] == pytest.approx(alone[0], abs=1e-6)
    engine.restore()
    assert logits(packed.model).equal(original)
    assert all(module.weight.data.equal(kept[name]) for name, module in packed_modules(packed.model))
    assert not any(module._forward_hooks for _, module in packed_modules(packed.model))


@needs_bnb
def test_an_edit_that_was_interrupted_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = loaded(folder, "llama", "bnb_4bit")
    editor, original = editor_of(packed.model, find_anatomy(packed.model)), logits(packed.model)
    editor.prepare(ablation(packed, "none"))
    made: list[Any] = []

    def interrupted(*given: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(DenseEdit(*given))
        return made[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packed_edits, "DenseEdit", interrupted)
        editor.set_edit(EDITS[0])
    editor.set_edit(None)
    assert logits(packed.model).equal(original)
    editor.set_edit(EDITS[0])
    assert not torch.allclose(logits(packed.model), original, atol=1e-2)
    editor.set_edit(None)
    assert logits(packed.model).equal(original)


@needs_bnb
def test_edits_in_8_bits_are_as_near_as_8_bits_are(folder: Path) -> None:
    """Inputs are rounded to 8 bits there, so that nothing is exact: the edit has to add nothing to that."""
    packed = loaded(folder, "llama", "bnb_8bit")
    twin, form = plain_twin(folder, "llama", packed), ablation(packed, "full")
    off = (logits(packed.model) - logits(twin.model)).norm()
    for model in (packed.model, twin.model):
        editor = editor_of(model, find_anatomy(model))
        editor.prepare(form)
        editor.set_edit(EDITS[0])
    assert (logits(packed.model) - logits(twin.model)).norm() < 2 * off


@needs_bnb
def test_the_library_takes_packed_models_but_edits_none_in_place(folder: Path) -> None:
    path = tiny("llama", folder / "llama-128", 128)
    model, tokenizer = hd.load(str(path), dtype="float32", quantization="bnb_4bit")
    found = hd.capture(model, tokenizer, ["cook", "bake"], ["sow", "plant"])
    edit, before = found.edit(), logits(model)
    with hd.ablated(model, edit):
        assert not torch.allclose(logits(model), before, atol=1e-2)
    assert logits(model).equal(before)
    with pytest.raises(UserError, match="cannot be edited in place; edit its outputs"):
        hd.apply(model, edit)
    assert logits(model).equal(before)
    scores = hd.score(model, tokenizer, edit, ["cook", "bake"], ["sow"], markers=["e"], max_new_tokens=4)
    assert scores.kl > 0 and logits(model).equal(before)


@needs_bnb
def test_on_a_cpu_blocks_that_do_not_end_with_rows_are_not_packed(folder: Path) -> None:
    """bitsandbytes 0.50.2 unpacks them wrongly there: such matrices stay as they are, and stored ones are refused."""
    plain, packed = loaded(folder, "llama", width=64), loaded(folder, "llama", "bnb_4bit", width=64)
    names = {name for name, _ in packed_modules(packed.model)}
    kept: Any = packed.model.get_submodule("model.layers.0.mlp.down_proj")
    assert "model.layers.0.self_attn.o_proj" in names and "model.layers.0.mlp.down_proj" not in names
    assert kept.in_features == 96 and kept.weight.equal(
        plain.model.get_submodule("model.layers.0.mlp.down_proj").weight
    )
    eight = loaded(folder, "llama", "bnb_8bit", width=64)
    assert "model.layers.0.mlp.down_proj" in {name for name, _ in packed_modules(eight.model)}
    stored = save_packed(folder / "llama-64", folder / "llama-64-stored", "bnb_4bit")
    choice = ModelChoice(str(stored), dtype="float32", quantization="bnb_4bit")
    with pytest.raises(UserError, match="no multiple of its blocks of 64"):
        load_weights(open_model(choice))
    dequantised = load_weights(open_model(replace(choice, quantization="none"))).model
    for name, weight in plain.model.named_parameters():
        assert (dequantised.get_parameter(name) - weight).abs().max() < 0.2 * weight.abs().max()


@needs_bnb
def test_what_packs_nothing_is_said_not_to(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    nobody: Any = None
    for width, told in ((32, "on edited weights"), (64, "on edited outputs, weights in 4 bits by bitsandbytes")):
        path = tiny("llama", folder / f"llama-{width}", width)
        opened = open_model(ModelChoice(str(path), dtype="float32", quantization="bnb_4bit"))
        job = Job(Settings(), World(0, 1), opened, find_anatomy(opened.skeleton()), nobody, [])
        run: Any = SimpleNamespace(job=job)
        assert how_edited(run) == told and job.held_as == ("none" if width == 32 else "bnb_4bit")
        caplog.clear()
        assert any(packed_modules(load_weights(opened).model)) is ("packs nothing" not in caplog.text) is (width == 64)


@needs_bnb
@pytest.mark.parametrize("quantization", PACKED)
def test_stored_matrices_are_read_as_if_they_were_not_packed(quantization: str, folder: Path) -> None:
    for width in (64, 128):  # in the first, blocks do not end with rows
        source = tiny("llama", folder / f"llama-{width}", width)
        stored = save_packed(source, folder / f"stored-{width}-{quantization}", quantization)
        opened = open_model(ModelChoice(str(stored), dtype="float32"))
        plain = open_model(ModelChoice(str(source), dtype="float32"))
        assert {name: info.shape for name, info in opened.headers.items()} == {
            name: info.shape for name, info in plain.headers.items()
        }
        whole, files = load_weights(opened).model, TensorFiles(stored, opened.headers)
        for name, weight in whole.named_parameters():
            assert files.read(name).float().equal(weight), name
            if weight.dim() == 2:
                part, some = torch.empty(len(weight), 3), torch.empty(7)
                files.read_into(name, part, 1, 2, 5)
                files.read_numbers_into(name, some, 11)
                assert part.equal(weight[:, 2:5]) and some.equal(weight.flatten()[11:18])


@needs_bnb
def test_scales_that_do_not_fit_are_refused(folder: Path) -> None:
    """Kernels take it for granted that there are as many as there are blocks, and read on."""
    stored = save_packed(tiny("llama", folder / "llama-128", 128), folder / "damaged", "bnb_4bit")
    file, name = stored / "model.safetensors", "model.layers.0.self_attn.o_proj.weight"
    tensors = load_file(file)
    state = f"{name}.quant_state.bitsandbytes__nf4"
    for damage, told in (
        ({f"{name}.absmax": tensors[f"{name}.absmax"][:5].clone()}, "which do not fit"),
        ({state: torch.tensor(list(b'{"shape": [9999, 128], "dtype": "float32"}'), dtype=torch.uint8)}, "states no"),
        ({state: torch.tensor(list(b"{"), dtype=torch.uint8)}, "cannot be read as JSON"),
    ):
        save_file(tensors | damage, file, metadata={"format": "pt"})
        for quantization in ("none", "bnb_4bit"):
            with pytest.raises(UserError, match=told):
                load_weights(open_model(ModelChoice(str(stored), dtype="float32", quantization=quantization)))


@pytest.mark.parametrize(("codes", "scales"), [((4, 8), 5), ((4, 8), 8), ((4, 8, 1), 4), ((32,), 32)])
def test_scales_of_8_bits_that_do_not_fit_are_refused(codes: tuple[int, ...], scales: int, tmp_path: Path) -> None:
    tensors = {"proj.weight": torch.ones(codes, dtype=torch.int8), "proj.SCB": torch.ones(scales)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"proj\.weight of shape .* scales, which do not fit .* again"):
        as_if_not_packed(tmp_path, read_headers(tmp_path))


@needs_bnb
@pytest.mark.parametrize("quantization", PACKED)
def test_plans_reckon_with_the_bytes_that_packed_weights_take(quantization: str, folder: Path) -> None:
    opened = open_model(ModelChoice(str(tiny("llama", folder / "llama-128", 128)), dtype="float32"))
    skeleton = opened.skeleton()
    facts = Facts("tiny", skeleton, find_anatomy(skeleton), torch.float32, Work(), packing=quantization)
    model = loaded(folder, "llama", quantization).model
    held = sum(parameter.nbytes for parameter in model.parameters())
    for _, module in packed_modules(model):
        state = getattr(module.weight, "quant_state", None)
        held += scales(module).nbytes if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
    assert set(facts.packed) == {name for name, _ in packed_modules(model)}
    assert facts.held == pytest.approx(held, rel=0.03) and facts.held < 0.75 * facts.weights


@pytest.mark.parametrize(("raw", "quantization", "told"), [
    ({"quantization_config": {"quant_method": "fp8"}}, "bnb_4bit", "quantised with fp8 already"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bnb_4bit",
     "stored in 8 bits; set model.quantization=bnb_8bit or none"),
])  # fmt: skip
def test_files_that_are_packed_otherwise_are_refused(raw: dict[str, Any], quantization: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        bnb.check_packing("m", quantization, raw, raw["quantization_config"]["quant_method"], True)


def test_pickled_weights_are_refused() -> None:
    with pytest.raises(UserError, match="made from safetensors files"):
        bnb.check_packing("m", "bnb_8bit", {}, None, False)


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_one_sentence(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(UserError) as caught:
        check_bitsandbytes("model.quantization=bnb_4bit")
    assert str(caught.value).endswith(f'needs {missing}, which is not installed here: pip install "heretic-ds[bnb]"')


@needs_bnb
def test_weights_that_a_first_forward_packed_anew_are_read_too(folder: Path) -> None:
    """As bitsandbytes does on CPUs with AVX512-BF16 to models that were loaded without us."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, for which alone bitsandbytes does so")
    model = loaded(folder, "llama", "bnb_4bit").model
    module = dict(packed_modules(model))["model.layers.0.self_attn.o_proj"]
    before = unpacked(module)
    module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        module(torch.randn(2, 128))
    assert module.weight.quant_state.packing_format_for_cpu and module.weight.shape == (128, 64)
    after = unpacked(module)
    assert torch.allclose(after, before, rtol=2**-7, atol=1e-6)
    assert module.weight.quant_state.packing_format_for_cpu and torch.equal(unpacked(module), after)


def test_a_configuration_that_is_no_mapping_is_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text_config is"):
        open_model(ModelChoice(str(spoilt(tmp_path, text_config=[1])), quantization="bnb_4bit"))


def spoilt(folder: Path, **changes: object) -> Path:
    """A tiny model with changes in its configuration."""
    families.save("llama", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder
