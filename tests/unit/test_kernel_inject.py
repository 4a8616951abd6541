"""DeepSpeed's injected blocks over a stand-in for their kernels, against the models they were injected into."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from heretic_ds.ablation import ROW_NORMS, Ablation, Edit, Profile
from heretic_ds.anatomy import find_anatomy
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.placements import build_engine
from heretic_ds.placements.deepspeed import Originals
from heretic_ds.placements.kernel_inject import KernelInject, adapter, inject_checked, parity, traits_of
from heretic_ds.placements.kernel_inject.adapter import ResidualSum
from heretic_ds.placements.kernel_inject.families import FAMILIES, find_family
from heretic_ds.placements.kernel_inject.inject import Injected, inject
from heretic_ds.placements.kernel_inject.op import load_kernels
from heretic_ds.placements.kernel_inject.workspace import Shape, Workspace
from heretic_ds.runner.engine import Runner, RunnerOptions
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests import families
from tests.conftest import ComposeSettings
from tests.injection_emulator import InferenceOp

LENGTHS = (9, 4, 6, 11, 1)
NEW_TOKENS = 6
EDIT = Edit(0.4, {"attention": Profile(1.1, 1.0, 0.4, 1.5), "mlp": Profile(0.9, 0.0, 0.3, 1.0)})
_USUAL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 128, "tie_word_embeddings": False, **families._TOKENS,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, object]] = {
    "llama": _GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "mistral": _GROUPED | {"sliding_window": 32},
    "qwen2": _GROUPED,
    "gpt2": {"n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 32},
    "gpt_neox": {
        "hidden_act": "gelu_new",
        "rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
    },
}
"""Of every family on the list; head size 16, the smallest whose halves the kernels rotate in float32."""


def build(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    names = _USUAL | CONFIGS[family] | changes
    if family == "gpt_neo":
        names = {k: v for k, v in names.items() if k not in ("num_hidden_layers", "num_attention_heads")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **names), dtype=torch.float32)
    families.randomise(model, seed)
    model.generation_config.pad_token_id = families.PAD
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def quiet_deepspeed() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceOp]:
    """The stand-in, where DeepSpeed looks for its compiled module."""
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    from heretic_ds.placements.kernel_inject.policies import forget

    stand_in = InferenceOp(pairs_as_in_half=True)
    monkeypatch.setattr(BaseOp, "inference_module", stand_in)
    yield stand_in
    forget()


def family_of(model: PreTrainedModel):
    return FAMILIES[model.config.model_type]


def injected_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, Injected]:
    twin = copy.deepcopy(model)
    return twin, inject(twin, find_anatomy(model), family_of(model), model.dtype)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in LENGTHS]


def engines(model: PreTrainedModel, batch_size: int = 3) -> tuple[Runner, Runner]:
    """The engine over the model, and the one over the same model with its kernels injected; both with an ablation."""
    tokenizer = families.tokenizer()
    options = RunnerOptions(NEW_TOKENS, batch_size)
    plain = Runner(model, find_anatomy(model), tokenizer, options)
    twin, injected = injected_copy(model)
    return plain, Runner(twin, injected.anatomy, tokenizer, options, traits=traits_of(injected))


def prepare(engine: Runner, row_norm: str = "full") -> None:
    shape = (engine.anatomy.n_blocks + 1, engine.anatomy.width)
    generator = torch.Generator().manual_seed(3)
    directions_LD = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    engine.prepare(Ablation(directions_LD, row_norm, through_norm=False))


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_prompts_and_of_every_decoded_token_equal_the_models(family: str, op: InferenceOp) -> None:
    """Left padding, growing batches, and rows that leave; each family's DeepSpeed blocks themselves run."""
    assert set(CONFIGS) == set(FAMILIES)
    model = build(family)
    expected = parity.sample(model)
    twin, injected = injected_copy(model)
    assert parity.error_of(twin, injected.adapter.expecting, expected) < 1e-5
    assert {type(block.injected).__module__.split(".")[0] for block in injected.adapter._blocks} == {"deepspeed"}


@pytest.mark.parametrize("family", CONFIGS)
def test_engine_gives_the_means_answers_and_kl_of_the_plain_one_and_restores_bit_for_bit(
    family: str, op: InferenceOp
) -> None:
    plain, injected = engines(build(family))
    before = {name: tensor.clone() for name, tensor in injected.model.state_dict().items()}
    expected_LD, found_LD = plain.capture(prompts()), injected.capture(prompts())
    assert ((found_LD - expected_LD).norm(dim=-1) / expected_LD.norm(dim=-1)).max() < 1e-5
    prepare(plain), prepare(injected)
    for engine in (plain, injected):
        engine.original = Divergence().begin(engine, prompts())
    for place, expected_KV in plain.original.reference_KV.items():
        assert torch.allclose(injected.original.reference_KV[place], expected_KV, atol=1e-5)
    for edit in (None, EDIT):
        expected, found = (e.original.of([edit])[0] for e in (plain, injected))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert injected.generate(prompts(), [edit]) == plain.generate(prompts(), [edit])
    assert expected > 1e-4
    injected.restore()
    after = injected.model.state_dict()  # with aliases of its own weights that DeepSpeed sets in a forward pass
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_edited_weights_are_those_of_the_plain_engine(family: str, row_norm: str, op: InferenceOp) -> None:
    plain, injected = engines(build(family))
    untouched = {name: tensor.clone() for name, tensor in injected.model.state_dict().items()}
    for engine in (plain, injected):
        prepare(engine, row_norm)
        engine.apply(EDIT)
    pairs = list(zip(plain.anatomy.writers, injected.anatomy.writers, strict=True))
    for ours, theirs in pairs:
        assert torch.allclose(ours.weight_DK(plain.model), theirs.weight_DK(injected.model), atol=1e-6)
    assert sum(not torch.equal(injected.model.get_parameter(w.weight), untouched[w.weight]) for _, w in pairs) >= 2
    injected.restore()
    restored = injected.model.state_dict()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in untouched.items())
    plain.restore()


def test_prompts_of_one_token_start_anew(op: InferenceOp) -> None:
    plain, injected = engines(build("llama"))
    rows = [row[:1] for row in prompts()]
    assert injected.generate(prompts(), [None]) == plain.generate(prompts(), [None])
    assert injected.generate(rows, [None]) == plain.generate(rows, [None])


def test_a_larger_batch_or_a_longer_answer_gets_a_new_workspace_and_smaller_ones_none(op: InferenceOp) -> None:
    plain, injected = engines(build("llama"))
    for size, answers in ((1, 1), (3, 2), (2, 2)):
        injected.batch_sizes["generate"] = plain.batch_sizes["generate"] = size
        assert injected.generate(prompts(), [None]) == plain.generate(prompts(), [None])
        assert len(op.allocations) == answers
    injected._options = plain._options = RunnerOptions(20)
    assert injected.generate(prompts(), [None]) == plain.generate(prompts(), [None])
    assert len(op.allocations) == 3 and op.allocations[-1] == (2, 31)


def test_a_wide_mlp_gets_more_tokens_than_it_asks_for(op: InferenceOp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inner activations would else be written over keys and values, which the next token needs."""
    model = build("qwen2", intermediate_size=10 * 64)
    expected = parity.sample(model)
    twin, injected = injected_copy(model)
    assert parity.error_of(twin, injected.adapter.expecting, expected) < 1e-5
    assert op.allocations[-1] == (4, 21)  # 9 tokens of 3 + 2 * 10 widths each, where 10 have room for each token
    injected.close()
    monkeypatch.setattr(Shape, "tokens_for", lambda self, prompt, new: prompt + new)
    twin, injected = injected_copy(model)
    assert parity.error_of(twin, injected.adapter.expecting, expected) > 0.05


def test_without_room_for_a_workspace_batches_are_halved(op: InferenceOp) -> None:
    plain, injected = engines(build("llama"), batch_size=5)
    shape = injected.traits.decoding.__self__._workspace.shape
    op.free_bytes = 100 * (1 << 20) + 5 * 4 * 17 + 3 * shape.bytes_for(1, 17) - 1
    assert injected.generate(prompts(), [None]) == plain.generate(prompts(), [None])
    assert injected.batch_sizes["generate"] == 2


def test_each_repair_is_needed(op: InferenceOp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of them the check at the start refuses the model, or the kernels are given what they cannot read."""
    model = build("llama")
    expected = parity.sample(model)

    twin, injected = injected_copy(model)
    for block in injected.adapter._blocks:
        assert isinstance(block.injected.mlp.residual_add_func, ResidualSum)
        from deepspeed.ops.transformer.inference.op_binding import ResidualAddOp

        block.injected.mlp.residual_add_func = ResidualAddOp(block.injected.config)
    with pytest.raises(UserError, match=r"other logits .*set evaluate=tensor_parallel"):
        parity.check(twin, injected.adapter, expected)
    injected.close()

    twin, injected = injected_copy(model)
    injected.adapter._reorder = lambda number_B: None
    assert parity.error_of(twin, injected.adapter.expecting, expected) > 0.05
    injected.close()

    twin, injected = injected_copy(model)
    workspace = injected.adapter._workspace
    workspace.make_room = lambda *needs: workspace.rows == 0 and Workspace.make_room(workspace, *needs)
    with pytest.raises(IndexError):
        parity.error_of(twin, injected.adapter.expecting, expected)
    injected.close()

    twin, injected = injected_copy(model)
    monkeypatch.setattr(adapter, "_OVERRUN_BYTES", 0)
    with pytest.raises(IndexError, match="added to a stream of 2304 reach beyond its memory"):
        parity.error_of(twin, injected.adapter.expecting, expected)


@pytest.mark.parametrize(("rows", "prompt", "new"), [(160, 700, 10), (120, 700, 10), (400, 200, 10), (6000, 2, 90)])
def test_passes_of_more_numbers_than_can_be_counted_are_refused(rows: int, prompt: int, new: int) -> None:
    """Of attention scores, of inner activations (twice), and of keys; as a lack of memory, which halves the batch."""
    workspace = Workspace(Shape(4096, 32, 32, 28672, 2, None), torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError, match=f"32 bits, too few for {rows} rows of {prompt} tokens"):
        workspace.make_room(rows, prompt, new)
    with pytest.raises(UserError, match=r"too few for a prompt of 9000 tokens; set evaluate=tensor_parallel"):
        workspace.make_room(1, 9000, new)
    assert workspace.rows == 0


def test_the_check_refuses_what_the_float32_kernel_makes_of_pairs(op: InferenceOp) -> None:
    op.pairs_as_in_half = False
    model = build("gptj")
    with pytest.raises(UserError, match=r"other logits .*set evaluate=tensor_parallel"):
        inject_checked(model, find_anatomy(model), family_of(model))


def test_low_precision_passes_the_check(op: InferenceOp) -> None:
    model = build("mistral").to(torch.bfloat16)
    inject_checked(model, find_anatomy(model), family_of(model))


def test_passes_that_do_not_continue_the_last_one_are_errors(op: InferenceOp) -> None:
    twin, _ = injected_copy(build("llama"))
    ids = torch.tensor([prompts()[0]])
    cache = DynamicCache(config=twin.config)
    twin(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="full"):
        twin(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    twin(input_ids=ids)
    with pytest.raises(RuntimeError, match="one token at a time"):
        twin(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_closing_leaves_nothing_behind(op: InferenceOp) -> None:
    from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference
    from deepspeed.module_inject import replace_module, replace_policy, utils
    from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention
    from deepspeed.ops.transformer.inference.ds_mlp import DeepSpeedMLP

    originals = Originals()
    _, injected = engines(build("llama"))
    injected.generate(prompts(), [None])
    injected.close()
    assert originals.replaced() == []
    assert replace_module.replace_policies is replace_policy.replace_policies
    assert replace_module.policy_to_ds_container is utils.policy_to_ds_container
    assert replace_module.container_g is None and DeepSpeedTransformerInference.workspace is None
    assert DeepSpeedTransformerInference.layer_id == DeepSpeedSelfAttention.num_layers == 0
    assert DeepSpeedSelfAttention._qkv_buffers == DeepSpeedMLP._inter_w_buffers == [] and op._space is None


def test_a_model_some_of_whose_blocks_stay_is_refused(op: InferenceOp) -> None:
    model = build("qwen2")
    with pytest.raises(UserError, match=r"replaced 0 of 2 blocks \(Qwen2DecoderLayer stayed\); set evaluate="):
        inject(model, find_anatomy(model), FAMILIES["gpt2"], torch.float32)


REFUSED = {
    "qwen3": ("qwen3", {}, "serves llama, mistral"),
    "scaled rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "'linear'",
    ),
    "biases": ("llama", {"attention_bias": True}, "attention_bias is True"),
    "head size": ("mistral", {"head_dim": 24}, "do not make up its width"),
    "small heads": ("llama", {"num_attention_heads": 8}, "do not rotate 8 numbers of a head of 8"),
    "odd heads": ("llama", {"hidden_size": 384, "num_attention_heads": 16}, "do not rotate 24 numbers of a head of 24"),
    "no norm of so many threads": ("llama", {"hidden_size": 128}, "do not norm rows of 128 in float32"),
    "norms of no kernel": (
        "llama",
        {"hidden_size": 20480, "num_attention_heads": 640, "num_key_value_heads": 640},
        "do not norm rows of 20480",
    ),
    "norms of half a warp": ("llama", {"hidden_size": 256, "num_attention_heads": 8}, "do not norm rows of 256"),
    "exact gelu": ("gpt_neox", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "serial": ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual is False"),
    "norm behind": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "pairs in float32": ("gptj", {}, "wrong for gptj in float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_the_kernels_compute_otherwise_are_refused_in_one_line(case: str) -> None:
    family, changes, message = REFUSED[case]
    config = AutoConfig.for_model(family, **(_USUAL | CONFIGS.get(family, {}) | changes))
    with pytest.raises(UserError, match=message) as refusal:
        find_family(config, torch.float32, "model.path=m")
    assert "set evaluate=tensor_parallel" in str(refusal.value) and "\n" not in str(refusal.value)


def job_for(config: object, device: str = "cuda", longest: int = 5) -> SimpleNamespace:
    opened = SimpleNamespace(device=torch.device(device), config=config, dtypes=[torch.float32])
    settings = SimpleNamespace(model=SimpleNamespace(path="m"), generation=SimpleNamespace(max_new_tokens=NEW_TOKENS))
    rows = SimpleNamespace(rows=[[0] * longest])
    return SimpleNamespace(opened=opened, settings=settings, texts={"target.eval": []}, prompts=lambda part: rows)


def test_without_cuda_the_placement_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = KernelInject("evaluate", KernelInject.Options())
    config = build("mistral").config
    with pytest.raises(UserError, match=r"CUDA devices only.* is cpu; set evaluate=tensor_parallel"):
        placement.check(job_for(config, "cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"evaluate\.degree is 2"):
        KernelInject("evaluate", KernelInject.Options(degree=2))
    with pytest.raises(UserError, match=r"up to 32 tokens.* takes 33"):
        placement.check(job_for(config, longest=27))
    with pytest.raises(UserError, match="up to 31 tokens"):
        placement.check(job_for(build("gpt_neo").config, longest=27))
    with pytest.raises(UserError, match=r"32 bits, too few for a prompt of 30000 tokens; set evaluate=tensor_parallel"):
        placement.check(job_for(build("llama").config, longest=30000))


def test_a_run_builds_the_placement_from_its_settings(
    op: InferenceOp, compose_settings: ComposeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, but for the three functions that ask for one."""
    build("mistral", sliding_window=64).save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text("a list\na longer line of text\n")
    sources = [f"prompts.{kind}.{part}.source={file}" for kind in ("target", "baseline") for part in ("train", "eval")]
    settings = compose_settings("evaluate=kernel_inject", "generation.max_new_tokens=8", *sources, model=tmp_path)
    job = Job.check(settings, World())
    with pytest.raises(UserError, match="CUDA devices only"):
        build_engine(job, "capture")
    monkeypatch.setattr("heretic_ds.placements.kernel_inject.op.refuse_without_cuda", lambda device: None)
    monkeypatch.setattr("heretic_ds.placements.kernel_inject.op.load_kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    engine, rows = build_engine(job, "evaluate"), job.prompts("target.eval").rows
    assert engine.traits.name == "kernel_inject" and engine.whole is None and engine.max_edits_per_pass == 1
    plain = build_engine(job, "capture")
    engine.batch_sizes.update(generate=2)
    plain.batch_sizes.update(generate=2)
    assert engine.generate(rows, [None]) == plain.generate(rows, [None])
    prepare(engine)
    assert engine.max_edits_per_pass == 1
    engine.close()


@pytest.mark.parametrize("built", [None, "nowhere.so"])
def test_kernels_that_cannot_be_had_are_one_line(built: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if built is not None:
        monkeypatch.setenv("HERETIC_DS_INFERENCE_OP", built)
    with pytest.raises(UserError, match=r"kernels cannot be had here .* or set evaluate=tensor_parallel") as refusal:
        load_kernels()
    assert "\n" not in str(refusal.value) and (built or "") in str(refusal.value)


def test_gpt_neos_window_is_right_up_to_its_limit_and_wrong_beyond(
    op: InferenceOp, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt_neo", window_size=14)
    plain, injected = engines(model)
    plain._options = injected._options = RunnerOptions(2)
    assert injected.generate(prompts(), [None]) == plain.generate(prompts(), [None])
    injected._options = RunnerOptions(3)
    with pytest.raises(UserError, match="up to 13 tokens"):
        injected.generate(prompts(), [None])
    injected.close()
    expected = parity.sample(model)
    twin, unlimited = injected_copy(model)
    monkeypatch.setattr("heretic_ds.placements.kernel_inject.workspace.refuse_long", lambda tokens, limit: None)
    assert (
        parity.error_of(twin, unlimited.adapter.expecting, expected) > 1e-3
    )  # 9 + 5 tokens, as many as the window has


SERVED = [(name, dtype) for name in FAMILIES for dtype in sorted(FAMILIES[name].dtypes, key=str)]


def build_for(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model that the kernels serve in a dtype: whole heads of 16 cannot be rotated in 16 bits."""
    wide = CONFIGS[family].get("num_key_value_heads") and dtype.itemsize == 2
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if wide else {}
    return build(family, **heads).to(dtype)


@pytest.mark.parametrize(("family", "dtype"), SERVED)
def test_what_is_compared_on_a_gpu_is_served(family: str, dtype: torch.dtype) -> None:
    find_family(build_for(family, dtype).config, dtype, "model.path=m")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; on a machine with one: make test-cuda")
class TestOnCuda:
    """The kernels themselves: `make test-cuda` on a machine with a GPU."""

    @pytest.mark.timeout(1200)  # they may have to be compiled first
    @pytest.mark.parametrize(("family", "dtype"), SERVED)
    def test_engines_agree_and_nothing_else_is_written(self, family: str, dtype: torch.dtype) -> None:
        load_kernels()
        plain, injected = engines(build_for(family, dtype).cuda())
        assert injected.model.dtype == dtype
        before = {name: tensor.clone() for name, tensor in injected.model.state_dict().items()}
        expected_LD, found_LD = plain.capture(prompts()), injected.capture(prompts())
        assert ((found_LD - expected_LD).norm(dim=-1) / expected_LD.norm(dim=-1)).max() < parity.tolerance(dtype)
        prepare(plain), prepare(injected)
        for engine in (plain, injected):
            engine.original = Divergence().begin(engine, prompts())
        for edit in (EDIT, None, EDIT):
            expected, found = (engine.original.of([edit])[0] for engine in (plain, injected))
            assert found == pytest.approx(expected, rel=0.1, abs=1e-5 if dtype == torch.float32 else 1e-3)
            for rows in (1, 3, 5):  # of 11 and less tokens: as many rows of the kernels as are no multiple of 16
                assert len(injected.generate(prompts()[:rows], [edit])[0]) == rows
        injected.restore()
        after = injected.model.state_dict()
        assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
        injected.close()
