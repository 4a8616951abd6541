"""Tiny random models of every supported family, for tests: two layers, 32 wide, never downloaded.

Gains of norms and biases are random, not 1 and 0: a model without them cannot show an edit that forgets a
bias or a norm behind a writer. Heads, experts and widths divide by 2 and mostly by 4, for tests of sharding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>")
CHARACTERS = ("\n", "\t", *(chr(code) for code in range(32, 127)))
VOCABULARY = (*SPECIAL_TOKENS, *CHARACTERS)
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TOKENS = {"vocab_size": len(VOCABULARY), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def _usual(model_type: str, **more: Any) -> Callable[..., PreTrainedConfig]:
    """Configuration under the names most families share; `more` overrides and adds to them."""

    def config(layers: int = 2, width: int = 32) -> PreTrainedConfig:
        fields = {
            **_TOKENS, "hidden_size": width, "intermediate_size": 3 * width // 2, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        }  # fmt: skip
        fields |= {key: value(layers, width) if callable(value) else value for key, value in more.items()}
        return AutoConfig.for_model(model_type, **{k: v for k, v in fields.items() if v is not _ABSENT})

    return config


_ABSENT = object()
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED = {"shared_expert_intermediate_size": 40}


def _first_then(first: str, then: str) -> Callable[[int, int], list[str]]:
    """Layer types alternating between two kinds, so that two layers show both."""
    return lambda layers, width: [(first, then)[i % 2] for i in range(layers)]


_DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "head_dim": 8,
    "layer_types": _first_then("linear_attention", "full_attention"),
}  # fmt: skip
_CONV = _first_then("conv", "full_attention")
_SLIDING = _first_then("sliding_attention", "full_attention")
_SANDWICH = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 8,
}  # fmt: skip
_MLA = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12, "head_dim": 4,
}  # fmt: skip
_CLASSIC = {"num_key_value_heads": _ABSENT}


def _wrapped(
    model_type: str, vision: dict[str, Any], text: Callable[..., PreTrainedConfig], **more: Any
) -> Callable[..., PreTrainedConfig]:
    """A vision-language wrapper around the text configuration `text`."""

    def config(layers: int = 2, width: int = 32) -> PreTrainedConfig:
        tower = text(layers, width).to_dict()
        vision_fields = {k: v(layers, width) if callable(v) else v for k, v in vision.items()}
        return AutoConfig.for_model(
            model_type, text_config=tower, vision_config=vision_fields, pad_token_id=PAD, **more
        )

    return config


_SECTIONED_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

_GEMMA4 = _SANDWICH | {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(VOCABULARY), "global_head_dim": 12,
    "layer_types": _SLIDING,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip

REQUIRED: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": _usual("llama", attention_bias=True, mlp_bias=True),
    "mistral": _usual("mistral", head_dim=12, sliding_window=4),
    "qwen2": _usual("qwen2"),
    "qwen3": _usual("qwen3", head_dim=12),
    "gemma2": _usual("gemma2", **_SANDWICH, tie_word_embeddings=True),
    "gemma3": _usual("gemma3_text", **_SANDWICH, layer_types=_SLIDING),
    "olmo2": _usual("olmo2"),
    "phi3": _usual("phi3", original_max_position_embeddings=256),
    "gpt2": _usual(
        "gpt2", **_CLASSIC, n_inner=lambda layers, width: 2 * width, intermediate_size=_ABSENT,
        tie_word_embeddings=True,
    ),
    "gpt_neox": _usual("gpt_neox", **_CLASSIC),
    "opt": _usual("opt", **_CLASSIC, ffn_dim=48, intermediate_size=_ABSENT, tie_word_embeddings=True),
    "mixtral": _usual("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _usual("qwen3_moe", **_MOE),
    "gpt_oss": _usual(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4,
        rope_parameters=_YARN,
    ),
    "deepseek_v3": _usual("deepseek_v3", **_MLA),
    "qwen3_next": _usual("qwen3_next", **_MOE, **_SHARED, **_DELTA_NET),
    "qwen3_5": _usual("qwen3_5_text", **_DELTA_NET),
    "lfm2": _usual(
        "lfm2", layer_types=_CONV, block_auto_adjust_ff_dim=False
    ),
    "gemma3_vl": _wrapped(
        "gemma3", {**_VISION, "model_type": "siglip_vision_model"}, _usual("gemma3_text", **_SANDWICH),
        mm_tokens_per_image=4, image_token_index=100, boi_token_index=101, eoi_token_index=102,
    ),
    "qwen2_vl": _wrapped(
        "qwen2_vl",
        {"depth": 1, "embed_dim": 16, "hidden_size": lambda layers, width: width, "num_heads": 2,
         "mlp_ratio": 2, "patch_size": 4},
        _usual("qwen2_vl_text", rope_parameters=_SECTIONED_ROPE),
        image_token_id=100, video_token_id=101, vision_start_token_id=102, vision_end_token_id=103,
    ),
    "llava": _wrapped(
        "llava", {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16}, _usual("llama"),
        image_token_index=100,
    ),
}  # fmt: skip

EXTRA: dict[str, Callable[..., PreTrainedConfig]] = {
    "opt_projected": _usual(
        "opt", **_CLASSIC, ffn_dim=48, intermediate_size=_ABSENT, word_embed_proj_dim=16,
        tie_word_embeddings=True,
    ),
    "opt_post_norm": _usual(
        "opt", **_CLASSIC, ffn_dim=48, intermediate_size=_ABSENT, do_layer_norm_before=False
    ),
    "gpt_neox_serial": _usual("gpt_neox", **_CLASSIC, use_parallel_residual=False),
    "gemma": _usual("gemma", head_dim=12),
    "gemma4": _usual("gemma4_text", **_GEMMA4),
    "gemma4_moe": _usual(
        "gemma4_text", **(_GEMMA4 | {"hidden_size_per_layer_input": 0}), enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=24,
    ),
    "qwen2_moe": _usual("qwen2_moe", **_MOE, **_SHARED),
    "qwen3_5_moe": _usual("qwen3_5_moe_text", **_MOE, **_SHARED, **_DELTA_NET),
    "qwen3_5_vl": _wrapped(
        "qwen3_5",
        {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
         "out_hidden_size": lambda layers, width: width, "num_position_embeddings": 16},
        _usual("qwen3_5_text", **_DELTA_NET),
        image_token_id=100, video_token_id=101, vision_start_token_id=102, vision_end_token_id=103,
    ),
    "olmo": _usual("olmo"),
    "olmo3": _usual("olmo3", sliding_window=4),
    "olmo_hybrid": _usual("olmo_hybrid", **_DELTA_NET),
    "olmoe": _usual("olmoe", num_experts=4, num_experts_per_tok=2),
    "flex_olmo": _usual("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "phi": _usual("phi"),
    "phimoe": _usual("phimoe", num_local_experts=4, num_experts_per_tok=2),
    "falcon": _usual("falcon", **_CLASSIC, intermediate_size=_ABSENT, bias=True),
    "falcon_new": _usual(
        "falcon", **_CLASSIC, intermediate_size=_ABSENT, new_decoder_architecture=True, num_kv_heads=2,
        bias=True,
    ),
    "falcon_h1": _usual("falcon_h1", **_MAMBA, mamba_d_ssm=64),
    "bamba": _usual("bamba", **_MAMBA, attn_layer_indices=[1]),
    "jamba": _usual(
        "jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "nemotron_h": _usual(
        "nemotron_h", layers_block_type=["mamba", "attention", "mlp", "moe"], num_hidden_layers=4,
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
        moe_shared_expert_intermediate_size=24, head_dim=8,
    ),
    "stablelm": _usual("stablelm"),
    "stablelm_parallel": _usual("stablelm", use_parallel_residual=True, use_qkv_bias=True),
    "cohere": _usual("cohere"),
    "cohere2": _usual("cohere2", sliding_window=4),
    "granite": _usual("granite", residual_multiplier=0.5),
    "granitemoe": _usual("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": _usual(
        "granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40
    ),
    "granitemoehybrid": _usual(
        "granitemoehybrid", **_MAMBA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40,
        layer_types=_first_then("mamba", "attention"),
    ),
    "glm": _usual("glm", head_dim=12),
    "glm4": _usual("glm4", head_dim=12),
    "glm4_moe": _usual("glm4_moe", **_ROUTED, head_dim=8),
    "glm4_moe_lite": _usual("glm4_moe_lite", **_MLA),
    "starcoder2": _usual("starcoder2"),
    "gptj": _usual("gptj", **_CLASSIC, intermediate_size=_ABSENT, rotary_dim=4, n_inner=48),
    "codegen": _usual("codegen", **_CLASSIC, intermediate_size=_ABSENT, rotary_dim=4, n_inner=48),
    "gpt_neo": _usual(
        "gpt_neo", **_CLASSIC, num_attention_heads=_ABSENT, num_heads=4, num_hidden_layers=_ABSENT,
        num_layers=lambda layers, width: layers,
        attention_types=lambda layers, width: [[["global"], layers]],
    ),
    "gpt_bigcode": _usual("gpt_bigcode", **_CLASSIC, intermediate_size=_ABSENT, n_inner=48),
    "bloom": _usual("bloom", **_CLASSIC, intermediate_size=_ABSENT),
    "mpt": _usual("mpt", **_CLASSIC, intermediate_size=_ABSENT, num_attention_heads=_ABSENT, n_heads=4),
    "smollm3": _usual("smollm3"),
    "helium": _usual("helium", head_dim=8),
    "exaone4": _usual("exaone4", sliding_window=4),
    "exaone_moe": _usual(
        "exaone_moe", **_MOE, num_shared_experts=1, first_k_dense_replace=1, sliding_window=4
    ),
    "nemotron": _usual("nemotron", head_dim=8),
    "arcee": _usual("arcee"),
    "apertus": _usual("apertus"),
    "ernie4_5": _usual("ernie4_5"),
    "ernie4_5_moe": _usual(
        "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "seed_oss": _usual("seed_oss", head_dim=8),
    "hunyuan_dense": _usual("hunyuan_v1_dense", head_dim=8),
    "hunyuan_moe": _usual("hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=2, num_shared_expert=1),
    "ministral3": _usual("ministral3", head_dim=8),
    "deepseek_v2": _usual("deepseek_v2", **_MLA),
    "lfm2_moe": _usual("lfm2_moe", **_MOE, num_dense_layers=1, layer_types=_CONV),
    "llama4": _usual(
        "llama4_text", num_local_experts=4, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=40,
        moe_layers=[1],
    ),
    "minimax_m2": _usual("minimax_m2", num_local_experts=4, num_experts_per_tok=2, head_dim=8, rotary_dim=4),
    "dots1": _usual("dots1", **_ROUTED),
    "solar_open": _usual("solar_open", **_ROUTED, head_dim=8),
    "afmoe": _usual("afmoe", **_MOE, num_dense_layers=1, num_shared_experts=1, head_dim=8),
    "persimmon": _usual("persimmon"),
    "vaultgemma": _usual("vaultgemma", **_SANDWICH),
}  # fmt: skip
"""Verified beyond the required families; kept apart so that slow tests can leave them out."""

FAMILIES = REQUIRED
"""Name -> function of `layers` and `width` that gives the configuration of one family."""

DISPATCHED_EXPERTS = frozenset({
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma4_moe", "qwen2_moe", "qwen3_5_moe",
    "olmoe", "flex_olmo", "phimoe", "jamba", "nemotron_h", "granitemoe", "granitemoeshared",
    "granitemoehybrid", "glm4_moe", "glm4_moe_lite", "exaone_moe", "ernie4_5_moe", "hunyuan_moe",
    "deepseek_v2", "lfm2_moe", "minimax_m2", "dots1", "solar_open", "afmoe",
})  # fmt: skip
"""Families whose fused experts look their forward up in transformers' `ALL_EXPERTS_FUNCTIONS`."""

UNDISPATCHED_EXPERTS = frozenset({"llama4"})
"""Families with fused experts that do not."""


def build(
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 2,
    width: int = 32,
    head_dim: int | None = None,
) -> PreTrainedModel:
    """A random model of `family` in eval mode: every gain, bias and matrix drawn from `seed`."""
    config = (REQUIRED | EXTRA)[family](layers=layers, width=width)
    if head_dim is not None:
        config.head_dim = head_dim
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    # The grouped matrix product that experts use by default knows no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some vectors start at random values
        model = auto.from_config(config, dtype=dtype, **experts)
    randomise(model, seed)
    model.generation_config.pad_token_id = PAD
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters anew, in place: matrices N(0, 0.2), vectors moved by up to 0.5 from their start.

    Moving, not replacing: a gain stays near the 1 (or, where the norm adds 1 itself, the 0) it starts from.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5).to(parameter))


def batch(model: PreTrainedModel, lengths: tuple[int, ...] = (9, 4, 6), seed: int = 0) -> dict[str, Tensor]:
    """Left-padded random prompts with all that a forward needs: ids, mask, positions from the mask.

    `input_ids`, `attention_mask` and `position_ids` are [len(lengths), max(lengths)]; positions are left out
    where the family's forward takes none (BLOOM and MPT derive theirs from the mask).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY) - 5, shape, generator=generator)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, shape[1] - length :] = 1
    inputs = {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: every ASCII text survives encoding and decoding, in 104 tokens."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]), padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=256,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save(
    family: str, folder: Path | str, tokenizer: PreTrainedTokenizerFast | None = None, **build_options: Any
) -> Path:
    """Write a folder that `from_pretrained` loads: random weights and a tokenizer with a chat template."""
    build(family, **build_options).save_pretrained(folder)
    (tokenizer or _character_tokenizer()).save_pretrained(folder)
    return Path(folder)


_character_tokenizer = tokenizer
