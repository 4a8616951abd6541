"""What is known about the layouts of Hugging Face decoders, as data.

All paths are exact and relative: in DECODERS to the decoder module, elsewhere to one block. `*` stands for a
whole number (an expert's index) and for nothing else. A family whose names are all listed here needs no
code; one with other names is refused with a message that lists them, and is taught by adding rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Component = Literal["attention", "mlp"]


@dataclass(frozen=True)
class DecoderRow:
    """Names of what makes a module a decoder: token embedding, blocks, norm after the last block."""

    embedding: str
    blocks: str
    final_norm: str


@dataclass(frozen=True)
class WriterRow:
    """One module that adds to the residual stream.

    `fused` names the parameter of a module that holds all experts in one tensor; None is a Linear or Conv1D.
    `alone` marks the writer of a block kind that has one component only (a mixer block of a hybrid).
    """

    path: str
    component: Component
    fused: str | None = None
    alone: bool = False


DECODERS = (
    DecoderRow("embed_tokens", "layers", "norm"),
    DecoderRow("embed_tokens", "layers", "final_layer_norm"),
    DecoderRow("embed_tokens", "layers", "final_layernorm"),
    DecoderRow("embed_tokens", "layers", "embedding_norm"),
    DecoderRow("embed_tokens", "layers", "layer_norm"),
    DecoderRow("embed_in", "layers", "final_layer_norm"),
    DecoderRow("wte", "h", "ln_f"),
    DecoderRow("word_embeddings", "h", "ln_f"),
    DecoderRow("wte", "blocks", "norm_f"),
    DecoderRow("embeddings", "layers", "norm_f"),
)

WRITERS = (
    WriterRow("self_attn.o_proj", "attention"),
    WriterRow("self_attn.out_proj", "attention"),
    WriterRow("self_attn.dense", "attention"),
    WriterRow("self_attention.dense", "attention"),
    WriterRow("attention.dense", "attention"),
    WriterRow("attn.c_proj", "attention"),
    WriterRow("attn.out_proj", "attention"),
    WriterRow("attn.attention.out_proj", "attention"),
    # Recurrent and convolutional mixers stand where attention stands.
    WriterRow("linear_attn.out_proj", "attention"),
    WriterRow("linear_attn.o_proj", "attention"),
    WriterRow("conv.out_proj", "attention"),
    WriterRow("mamba.out_proj", "attention"),
    WriterRow("mlp.down_proj", "mlp"),
    WriterRow("mlp.c_proj", "mlp"),
    WriterRow("mlp.fc2", "mlp"),
    WriterRow("mlp.fc_out", "mlp"),
    WriterRow("mlp.dense_4h_to_h", "mlp"),
    WriterRow("feed_forward.down_proj", "mlp"),
    WriterRow("feed_forward.w2", "mlp"),
    WriterRow("ffn.down_proj", "mlp"),
    WriterRow("fc2", "mlp"),
    WriterRow("shared_mlp.output_linear", "mlp"),
    WriterRow("per_layer_projection", "mlp"),
    WriterRow("mlp.shared_expert.down_proj", "mlp"),
    WriterRow("mlp.shared_experts.down_proj", "mlp"),
    WriterRow("mlp.shared_mlp.down_proj", "mlp"),
    WriterRow("feed_forward.shared_expert.down_proj", "mlp"),
    WriterRow("mlp.experts", "mlp", fused="down_proj"),
    WriterRow("feed_forward.experts", "mlp", fused="down_proj"),
    WriterRow("block_sparse_moe.experts", "mlp", fused="down_proj"),
    WriterRow("experts", "mlp", fused="down_proj"),
    # Experts as a list of modules: remote code, and what transformers 4 had.
    WriterRow("mlp.experts.*.down_proj", "mlp"),
    WriterRow("feed_forward.experts.*.down_proj", "mlp"),
    WriterRow("block_sparse_moe.experts.*.w2", "mlp"),
    # Hybrids whose blocks hold one mixer each.
    WriterRow("mixer.out_proj", "attention", alone=True),
    WriterRow("mixer.o_proj", "attention", alone=True),
    WriterRow("mixer.down_proj", "mlp", alone=True),
    WriterRow("mixer.shared_experts.down_proj", "mlp", alone=True),
    WriterRow("mixer.experts", "mlp", fused="down_proj", alone=True),
)

# Fused experts are stored [E, D, K] unless their class says otherwise, by the attribute `is_transposed` that
# transformers' experts decorator sets, or, where a class is not decorated, here.
TRANSPOSED_EXPERTS = frozenset({"Llama4TextExperts", "GptOssExperts"})

# Modules that read the stream or feed a writer, and may have as many outputs as the stream is wide: parent ->
# names. Whatever else in a block has that many outputs is refused, because it may be a writer.
_ATTENTION_READERS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "gate_proj", "g_proj", "output_gate",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
)  # fmt: skip
_ATTENTION_NORMS = (
    "q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm", "q_a_layernorm",
    "kv_a_layernorm", "norm",
)  # fmt: skip
_MAMBA_READERS = ("in_proj", "x_proj", "dt_proj", "conv1d", "norm", "dt_layernorm", "b_layernorm", "c_layernorm")
_MLP_READERS = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h")
_ROUTERS = ("gate", "gate.wg", "router", "router.gate", "shared_expert_gate", "gate.moe_statics")

_READERS: dict[str, tuple[str, ...]] = {
    "": ("fc1", "per_layer_input_gate", "router", "router.proj", "mamba", "mixer"),
    "self_attn": _ATTENTION_READERS + _ATTENTION_NORMS,
    "self_attention": ("query_key_value", "q_layernorm", "k_layernorm"),
    "attention": ("query_key_value",),
    "attn": ("c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "Wqkv", "q_ln", "k_ln"),
    "attn.attention": ("q_proj", "k_proj", "v_proj"),
    "linear_attn": (
        "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "norm",
        "q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm",
    ),
    "conv": ("in_proj", "conv"),
    "mamba": _MAMBA_READERS,
    "mixer": (*_MAMBA_READERS, "q_proj", "k_proj", "v_proj", "up_proj", "gate"),
    "mixer.shared_experts": _MLP_READERS,
    "mlp": _MLP_READERS + _ROUTERS,
    "feed_forward": _MLP_READERS + _ROUTERS,
    "ffn": _MLP_READERS,
    "shared_mlp": ("input_linear",),
    "block_sparse_moe": _ROUTERS,
    "mlp.shared_expert": _MLP_READERS,
    "mlp.shared_experts": _MLP_READERS,
    "mlp.shared_mlp": _MLP_READERS,
    "feed_forward.shared_expert": _MLP_READERS,
    "mlp.experts.*": _MLP_READERS,
    "feed_forward.experts.*": _MLP_READERS,
    "block_sparse_moe.experts.*": _MLP_READERS,
}  # fmt: skip

READER_PATHS = frozenset(f"{parent}.{name}" if parent else name for parent, names in _READERS.items() for name in names)

# Parameters beside the writing one in a module of fused experts.
FUSED_READERS = frozenset({"gate_up_proj", "up_proj", "gate_proj", "gate_up_proj_bias"})


@dataclass(frozen=True)
class NormLayout:
    """The norms of one block kind: their exact names, and which of them stand before the stream.

    `after` maps a component, or the path of a writer that differs from its component, to the norms its output
    passes, in order. A name means different things in different families (`post_attention_layernorm` follows
    the attention in Gemma 2 and precedes the MLP in Llama): only the whole set identifies a layout.
    """

    names: frozenset[str]
    after: dict[str, tuple[str, ...]]


def _layout(names: str, **after: str) -> NormLayout:
    return NormLayout(frozenset(names.split()), {key: tuple(norms.split()) for key, norms in after.items()})


_SANDWICH = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"

NORM_LAYOUTS = (
    _layout("input_layernorm"),
    _layout("input_layernorm post_attention_layernorm"),
    _layout("input_layernorm pre_ff_layernorm"),
    _layout("input_layernorm pre_feedforward_layernorm"),
    _layout("attention_layernorm feedforward_layernorm"),
    _layout("self_attn_layer_norm final_layer_norm"),
    _layout("operator_norm ffn_norm"),
    _layout("ln_1"),
    _layout("ln_1 ln_2"),
    _layout("ln_attn ln_mlp"),
    _layout("norm_1 norm_2"),
    _layout("norm"),
    _layout(
        "post_attention_layernorm post_feedforward_layernorm",
        attention="post_attention_layernorm",
        mlp="post_feedforward_layernorm",
    ),
    _layout(_SANDWICH, attention="post_attention_layernorm", mlp="post_feedforward_layernorm"),
    _layout(
        f"{_SANDWICH} post_per_layer_input_norm",
        attention="post_attention_layernorm",
        mlp="post_feedforward_layernorm",
        per_layer_projection="post_per_layer_input_norm",
    ),
    _layout(
        f"{_SANDWICH} pre_feedforward_layernorm_2 post_feedforward_layernorm_1 post_feedforward_layernorm_2",
        attention="post_attention_layernorm",
        mlp="post_feedforward_layernorm_1 post_feedforward_layernorm",
        experts="post_feedforward_layernorm_2 post_feedforward_layernorm",
    ),
    _layout(
        "input_layernorm post_self_attn_layernorm post_attention_layernorm post_mlp_layernorm",
        attention="post_self_attn_layernorm",
        mlp="post_mlp_layernorm",
    ),
    _layout(
        "input_layernorm post_attention_layernorm pre_mlp_layernorm post_mlp_layernorm",
        attention="post_attention_layernorm",
        mlp="post_mlp_layernorm",
    ),
)

# Norm classes that may follow a writer, all RMS norms: gain = offset + weight.
NORM_OFFSETS = {
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
    "Gemma4RMSNorm": 0.0,
    "Olmo2RMSNorm": 0.0,
    "Olmo3RMSNorm": 0.0,
    "OlmoHybridRMSNorm": 0.0,
    "FlexOlmoRMSNorm": 0.0,
    "Exaone4RMSNorm": 0.0,
    "Glm4RMSNorm": 0.0,
    "AfmoeRMSNorm": 0.0,
}
