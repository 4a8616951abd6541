"""The anatomy of every family: writers complete, residuals where transformers has them, nothing skipped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from heretic_ds.anatomy import Anatomy, find_anatomy, has_expert_dispatch
from heretic_ds.anatomy.tables import FUSED_READERS, NORM_LAYOUTS, NORM_OFFSETS, READER_PATHS
from heretic_ds.errors import UserError
from tests.families import (
    DISPATCHED_EXPERTS,
    EXTRA,
    REQUIRED,
    UNDISPATCHED_EXPERTS,
    batch,
    build,
    save,
    tokenizer,
)

EVERY = [*REQUIRED, *EXTRA]
# Here the stream itself is normalised after each addition, so blocks do not just add to it.
POST_NORM_STREAM = {"opt_post_norm"}


@cache
def _shared(family: str) -> tuple[PreTrainedModel, Anatomy]:
    """An unchanging model per family, for tests that only read."""
    model = build(family)
    return model, find_anatomy(model)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _tapped(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _store(into: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: into.append(_first(output).clone())


def _store_input(into: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, kwargs: into.append(_hidden(args, kwargs).clone())


@torch.no_grad()
def _residuals(model: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The L+1 residuals as the anatomy says to tap them, each [B, S, D]."""
    blocks: Any = model.get_submodule(anatomy.blocks)
    taken: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(_store_input(taken), with_kwargs=True)]
    hooks += [block.register_forward_hook(_store(taken)) for block in blocks[:-1]]
    hooks += [model.get_submodule(anatomy.final_norm).register_forward_hook(_store(taken))]
    with _tapped(*hooks):
        model(**inputs, use_cache=False)
    return taken


@torch.no_grad()
def _written_along(model: PreTrainedModel, anatomy: Anatomy, direction_D: Tensor) -> Tensor:
    """|v·Δ| / |Δ| for what each block adds (Δ = output - input) at each unpadded position: [L, positions]."""
    inputs = batch(model)
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    hooks = []
    for block in model.get_submodule(anatomy.blocks).children():
        hooks += [block.register_forward_pre_hook(_store_input(entering), with_kwargs=True)]
        hooks += [block.register_forward_hook(_store(leaving))]
    with _tapped(*hooks):
        model(**inputs, use_cache=False)
    added = torch.stack(leaving).sub(torch.stack(entering))[:, inputs["attention_mask"].bool()]
    return (added @ direction_D).abs() / added.norm(dim=-1)


def _unit_vector(width: int) -> Tensor:
    return nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)


@torch.no_grad()
def _project_out(model: PreTrainedModel, anatomy: Anatomy, direction_D: Tensor) -> None:
    """Take `direction_D` out of all that the writers can put into the stream, through norms behind them."""
    for writer in anatomy.writers:
        if writer.bias is not None:
            model.get_parameter(writer.bias).zero_()
        gain = writer.norm_gain(model)
        v = direction_D if gain is None else nn.functional.normalize(gain * direction_D, dim=0)
        weight = writer.weight_DK(model)
        weight -= v[:, None] * (v @ weight).unsqueeze(-2)


@pytest.mark.parametrize("family", [family for family in EVERY if family not in POST_NORM_STREAM])
def test_no_writer_is_missed(family: str) -> None:
    """With v taken out of every writer, no block adds anything along v."""
    model = build(family)
    anatomy = find_anatomy(model)
    direction_D = _unit_vector(anatomy.width)
    assert _written_along(model, anatomy, direction_D).mean() > 0.05, "a random model writes along any direction"
    _project_out(model, anatomy, direction_D)
    assert _written_along(model, anatomy, direction_D).max() < 1e-5


@pytest.mark.parametrize("family", EVERY)
def test_every_writer_matters(family: str) -> None:
    """Each writer's weight changes its own block's output, so none is listed that the model never runs."""
    model, anatomy = build(family), _shared(family)[1]
    inputs = batch(model, lengths=(32, 20))
    original = _residuals(model, anatomy, inputs)
    for writer in anatomy.writers:
        weight = writer.weight_DK(model)
        kept = weight.clone()
        weight.mul_(0.5)
        changed = _residuals(model, anatomy, inputs)
        weight.copy_(kept)
        same = [torch.equal(a, b) for a, b in zip(original, changed, strict=True)]
        assert same == [True] * (writer.block + 1) + [False] * (anatomy.n_blocks - writer.block), writer.module


@pytest.mark.parametrize("family", EVERY)
def test_taps_are_the_hidden_states_of_transformers(family: str) -> None:
    model, anatomy = _shared(family)
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    taken = _residuals(model, anatomy, inputs)
    assert [tensor.shape[-1] for tensor in taken] == [anatomy.width] * (anatomy.n_blocks + 1)
    if family == "opt_projected":  # transformers' last entry has left the stream through `project_out`
        assert expected[-1].shape[-1] != anatomy.width
        expected, taken = expected[:-1], taken[:-1]
    for mine, theirs in zip(taken, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", EVERY)
def test_left_padding_changes_nothing_at_the_last_position(family: str) -> None:
    model, anatomy = _shared(family)
    padded = batch(model)
    alone = {name: tensor[1:2, -4:] for name, tensor in padded.items()}
    for short, long in zip(_residuals(model, anatomy, alone), _residuals(model, anatomy, padded), strict=True):
        torch.testing.assert_close(short[0, -1], long[1, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_meta_device_gives_the_same_anatomy(family: str) -> None:
    expected = _shared(family)[1]  # kept for other tests: with memory
    with torch.device("meta"):
        assert find_anatomy(_build_on_meta(family)) == expected


def _build_on_meta(family: str) -> nn.Module:
    """The family's model without memory, as loaders build it before the weights arrive."""
    model, _ = _shared(family)
    config = model.config
    return type(model)(config)


@pytest.mark.parametrize("family", EVERY)
def test_weight_view_edits_the_model_and_is_laid_out_output_first(family: str) -> None:
    model, anatomy = build(family), _shared(family)[1]
    for writer in anatomy.writers:
        parameter, weight = model.get_parameter(writer.weight), writer.weight_DK(model)
        assert weight.shape[-2] == anatomy.width
        assert weight.shape[0] == writer.experts if writer.experts else weight.ndim == 2
        assert writer.weight == f"{writer.module}.{writer.weight.rpartition('.')[2]}"
        assert not weight.requires_grad
        weight[..., 1, 2] = 7.0
        entry = parameter[..., 2, 1] if writer.layout in ("KD", "EKD") else parameter[..., 1, 2]
        assert (entry == 7.0).all()


@pytest.mark.parametrize("family", EVERY)
def test_norm_offsets_are_what_the_norms_compute(family: str) -> None:
    """gain = offset + weight, measured: an RMS norm maps a vector of ones to its gain, and those of two multiply."""
    model, anatomy = _shared(family)
    for writer in anatomy.writers:
        if writer.norm is not None:
            measured = torch.ones(anatomy.width)
            for path in filter(None, (writer.norm, writer.inner_norm)):
                with torch.no_grad():
                    measured = measured * model.get_submodule(path)(torch.ones(1, anatomy.width))[0]
            gain = writer.norm_gain(model)
            assert gain is not None and gain.dtype == torch.float32
            torch.testing.assert_close(gain, measured, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_readers_are_known_at_any_width(family: str) -> None:
    """In a real model any reader may have as many outputs as the stream; here few do, so ask the tables."""
    model, anatomy = _shared(family)
    writers = {writer.weight for writer in anatomy.writers}
    norms = frozenset().union(*(layout.names for layout in NORM_LAYOUTS))
    for index, block in enumerate(model.get_submodule(anatomy.blocks).children()):
        for name, parameter in block.named_parameters():
            path, _, own = name.rpartition(".")
            reads = own in FUSED_READERS or own == "down_proj_bias" or path in READER_PATHS | norms
            vector = parameter.ndim == 1 and own != "weight"
            assert reads or vector or f"{anatomy.blocks}.{index}.{name}" in writers, name


EXPECTED = {
    "llama": ["2 attention writers (self_attn.o_proj)", "2 mlp writers (mlp.down_proj)"],
    "gemma3_vl": [
        "2 attention writers (self_attn.o_proj, then post_attention_layernorm)",
        "2 mlp writers (mlp.down_proj, then post_feedforward_layernorm)",
    ],
    "gpt2": ["2 attention writers (attn.c_proj)", "2 mlp writers (mlp.c_proj)"],
    "deepseek_v3": [
        "2 attention writers (self_attn.o_proj)",
        "1 mlp writer (mlp.down_proj)",
        "1 x 4 expert mlp writers (mlp.experts.down_proj)",
        "1 mlp writer (mlp.shared_experts.down_proj)",
    ],
    "lfm2": [
        "1 attention writer (conv.out_proj)",
        "1 attention writer (self_attn.out_proj)",
        "2 mlp writers (feed_forward.w2)",
    ],
    "qwen3_next": [
        "1 attention writer (linear_attn.out_proj)",
        "1 attention writer (self_attn.o_proj)",
        "2 x 4 expert mlp writers (mlp.experts.down_proj)",
        "2 mlp writers (mlp.shared_expert.down_proj)",
    ],
    "olmo_hybrid": [
        "1 attention writer (linear_attn.o_proj)",
        "1 attention writer (self_attn.o_proj, then post_attention_layernorm)",
        "1 mlp writer (mlp.down_proj)",
        "1 mlp writer (mlp.down_proj, then post_feedforward_layernorm)",
    ],
}


@pytest.mark.parametrize("family", EXPECTED)
def test_summary_counts_the_writers(family: str) -> None:
    assert _shared(family)[1].summary() == "2 blocks: " + ", ".join(EXPECTED[family])


def test_layouts_and_biases() -> None:
    layouts = {
        family: {w.layout for w in _shared(family)[1].writers} for family in ("llama", "gpt2", "gpt_oss", "mixtral")
    }
    assert layouts == {"llama": {"DK"}, "gpt2": {"KD"}, "gpt_oss": {"DK", "EKD"}, "mixtral": {"DK", "EDK"}}
    biases = {w.bias for w in _shared("gpt_oss")[1].writers if w.block == 1}
    assert biases == {"model.layers.1.self_attn.o_proj.bias", "model.layers.1.mlp.experts.down_proj_bias"}
    assert {w.bias for w in _shared("qwen2")[1].writers} == {None}


def test_paths_in_a_vision_language_wrapper_are_the_text_towers() -> None:
    anatomy = _shared("qwen2_vl")[1]
    assert anatomy.decoder == "model.language_model"
    assert anatomy.blocks == "model.language_model.layers"
    assert anatomy.embedding == "model.language_model.embed_tokens"
    assert anatomy.final_norm == "model.language_model.norm"
    assert all(writer.module.startswith("model.language_model.layers.") for writer in anatomy.writers)


def test_a_bare_decoder_is_its_own_root() -> None:
    model, _ = _shared("llama")
    anatomy = find_anatomy(model.model)
    assert (anatomy.decoder, anatomy.blocks, anatomy.final_norm) == ("", "layers", "norm")


def test_without_a_final_norm_the_last_block_gives_the_last_residual() -> None:
    assert _shared("opt_post_norm")[1].final_norm == "model.decoder.layers.1"


def test_expert_dispatch_is_recognised() -> None:
    fused = {
        family: has_expert_dispatch(model.get_submodule(writer.module))
        for family in EVERY
        for model, anatomy in [_shared(family)]
        for writer in anatomy.writers
        if writer.experts is not None
    }
    assert {family for family, dispatched in fused.items() if dispatched} == DISPATCHED_EXPERTS
    assert {family for family, dispatched in fused.items() if not dispatched} == UNDISPATCHED_EXPERTS


class _ListedExperts(nn.Module):
    """Experts as remote code has them: a list of MLPs, every one used with equal weight."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList()
        for _ in range(experts):
            expert = nn.Module()
            expert.up_proj, expert.down_proj = nn.Linear(width, 20), nn.Linear(20, width)
            self.experts.append(expert)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert.down_proj(expert.up_proj(x)) for expert in self.experts]).mean(0)  # type: ignore


def test_experts_in_a_module_list_are_writers_each() -> None:
    model = build("llama")
    for block in model.model.layers:
        block.mlp = _ListedExperts(32, 4)
    anatomy = find_anatomy(model)
    assert "2 x 4 expert mlp writers (mlp.experts.*.down_proj)" in anatomy.summary()
    assert "model.layers.1.mlp.experts.3.down_proj" in [writer.module for writer in anatomy.writers]
    direction_D = _unit_vector(32)
    _project_out(model, anatomy, direction_D)
    assert _written_along(model, anatomy, direction_D).max() < 1e-5


def _refusal(model: nn.Module) -> str:
    with pytest.raises(UserError) as caught:
        find_anatomy(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_linear_as_wide_as_the_stream_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.side_proj = nn.Linear(8, 32)
    message = _refusal(model)
    assert "model.layers.1 " in message and "self_attn.side_proj.weight (Linear [32, 8])" in message


def test_a_narrower_unknown_linear_is_no_writer() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.side_proj = nn.Linear(32, 8)
    assert find_anatomy(model) == _shared("llama")[1]


@pytest.mark.parametrize("shape", [(4, 32, 7), (4, 7, 32)])
def test_an_unknown_parameter_beside_fused_experts_is_refused(shape: tuple[int, ...]) -> None:
    model = build("mixtral")
    model.model.layers[0].mlp.experts.side = nn.Parameter(torch.zeros(shape))
    assert "mlp.experts.side (MixtralExperts" in _refusal(model)


def test_a_transposed_writer_of_unknown_kind_is_refused() -> None:
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.transpose(1, 2).contiguous())
    message = _refusal(model)
    assert "mlp.experts.down_proj has the shape [4, 48, 32]" in message and "EDK" in message


def test_a_block_without_a_writer_lists_its_submodules() -> None:
    model = build("llama")
    model.model.layers[1].mlp = nn.Identity()
    model.model.layers[1].self_attn = nn.Identity()
    message = _refusal(model)
    assert "model.layers.1 " in message and "attention and mlp" in message
    assert "mlp (Identity)" in message and "input_layernorm (LlamaRMSNorm)" in message


def test_a_block_with_one_component_is_refused_unless_its_kind_has_one() -> None:
    model = build("llama")
    model.model.layers[0].mlp = nn.Identity()
    assert "no known writer of the mlp component" in _refusal(model)
    components = {w.block: w.component for w in _shared("nemotron_h")[1].writers}
    assert components == {0: "attention", 1: "attention", 2: "mlp", 3: "mlp"}


def test_unknown_norms_are_refused() -> None:
    model = build("llama")
    model.model.layers[0].post_feedforward_layernorm = nn.LayerNorm(32)
    assert "input_layernorm, post_attention_layernorm, post_feedforward_layernorm" in _refusal(model)
    model = build("llama")
    model.model.layers[0].self_attn.sub_norm = nn.LayerNorm(32)
    assert "self_attn.sub_norm.weight (LayerNorm [32])" in _refusal(model)


def test_a_norm_of_unknown_gain_behind_a_writer_is_refused() -> None:
    model = build("gemma3")
    model.model.layers[1].post_feedforward_layernorm = nn.LayerNorm(32)
    assert "post_feedforward_layernorm, which follows a writer, is a LayerNorm" in _refusal(model)
    assert NORM_OFFSETS[Gemma3RMSNorm.__name__] == 1.0


def test_no_decoder_and_several_decoders_are_refused() -> None:
    assert "no decoder of a known layout" in _refusal(nn.Sequential(nn.Linear(2, 2)))
    model, _ = _shared("llama")
    assert "2 decoders (0.model, 1.model)" in _refusal(nn.ModuleList([model, build("llama")]))


def test_cross_attention_is_refused() -> None:
    config = GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50, add_cross_attention=True)
    assert "crossattention.c_proj.weight" in _refusal(GPT2LMHeadModel(config))


def test_models_are_random_where_defaults_would_hide_errors() -> None:
    for family in REQUIRED:
        for name, parameter in _shared(family)[0].named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                assert parameter.std() > 0.05, f"{family}: {name}"


@pytest.mark.parametrize("family", REQUIRED)
def test_models_are_their_seeds(family: str) -> None:
    first, again, other = _shared(family)[0].state_dict(), build(family).state_dict(), build(family, seed=1)
    assert first.keys() == again.keys() == other.state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = find_anatomy(other).writers[0].weight
    assert not torch.equal(first[weight], other.state_dict()[weight])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gemma3"])
def test_models_of_other_types_and_sizes_run(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype, layers=4, width=64)
    anatomy = find_anatomy(model)
    assert (anatomy.n_blocks, anatomy.width) == (4, 64)
    taken = _residuals(model, anatomy, batch(model))
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in taken)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gpt_oss"])
def test_saved_folders_load_again(family: str, tmp_path) -> None:
    folder = save(family, tmp_path / family)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    model, anatomy = _shared(family)
    assert find_anatomy(loaded) == anatomy
    for writer in anatomy.writers:
        assert torch.equal(writer.weight_DK(loaded), writer.weight_DK(model))
    words = AutoTokenizer.from_pretrained(folder)
    ids = words.apply_chat_template(
        [{"role": "user", "content": "Bake bread?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert words.decode(ids) == "<bos><|user|>Bake bread?<eos><|assistant|>"
    assert words.decode(ids, skip_special_tokens=True) == "Bake bread?"


def test_the_tokenizer_keeps_every_ascii_text() -> None:
    words = tokenizer()
    text = "A  line, 100% (exact);\n\tand another: `x` ~ 'y'."
    assert words.decode(words(text)["input_ids"]) == text
    padded = words(["ab", "c"], padding=True)
    assert padded["input_ids"][1][0] == words.pad_token_id, "padding is on the left"


def test_positions_are_given_wherever_the_forward_takes_them() -> None:
    without = {f for f in EVERY if "position_ids" not in inspect.signature(_shared(f)[0].forward).parameters}
    assert without == {"bloom", "mpt"}
