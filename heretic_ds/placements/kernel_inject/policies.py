"""How DeepSpeed finds the weights of a block: its own policies and containers, completed for today's models.

A policy reads tensors off a block, a container lays them out for the kernels. Both are looked up in tables inside
DeepSpeed that know only DeepSpeed's own classes; :func:`only` puts one family's pair there for as long as it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference
from deepspeed.module_inject import replace_module
from deepspeed.module_inject.containers import (
    DS_GPT2Container,
    DS_GPTJContainer,
    DS_GPTNEOContainer,
    DS_GPTNEOXContainer,
    DS_LLAMAContainer,
    DS_OPTContainer,
    GPTNEOXLayerPolicy,
    HFGPT2LayerPolicy,
    HFGPTJLayerPolicy,
    HFGPTNEOLayerPolicy,
    HFOPTLayerPolicy,
    LLAMALayerPolicy,
)
from deepspeed.module_inject.policy import TransformerPolicy
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
from transformers.models.gptj.modeling_gptj import GPTJBlock
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer


class GatedPolicy(LLAMALayerPolicy):  # type: ignore[misc]
    """Llama's policy, with the biases of queries, keys and values that Qwen2 has."""

    def attention(self, enable_training: bool = False) -> tuple[Any, Any, Any, Any]:
        weight, _, output, _ = super().attention(enable_training)
        attention = self.client_module.self_attn
        biases = [projection.bias for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        bias = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=enable_training)
        return weight, bias, output, None


class NeoxPolicy(GPTNEOXLayerPolicy):  # type: ignore[misc]
    """GPT-NeoX's policy: the shape of its heads is no longer told by the attention module, but by its configuration."""

    def get_hidden_heads(self) -> tuple[int, int, float, int]:
        block, config = self.client_module, self.client_module.attention.config
        inner = block.mlp.dense_h_to_4h.out_features
        return config.hidden_size, config.num_attention_heads, block.input_layernorm.eps, inner


def _of_real_width(container: type[Any]) -> type[Any]:
    """The container, taking the inner width from the weights, where DeepSpeed supposes four times the outer one."""

    class RealWidth(container):  # type: ignore[misc]
        def set_hidden_heads(self, hidden_size: int, heads: int, epsilon: float, intermediate_size: int) -> None:
            super().set_hidden_heads(hidden_size, heads, epsilon, self._h4h_w.numel() // hidden_size)

    return RealWidth


class GatedContainer(DS_LLAMAContainer):  # type: ignore[misc]
    """Llama's container, told how many heads keys and values have."""

    def create_module(self, config: Any = None) -> nn.Module:
        self.ds_model_config.num_kv = self.policy.client_module.self_attn.config.num_key_value_heads
        module: nn.Module = super().create_module(config)
        return module


class NeoxContainer(_of_real_width(DS_GPTNEOXContainer)):  # type: ignore[misc]
    """GPT-NeoX's container, told the base of its rotary positions."""

    def create_module(self, config: Any = None) -> nn.Module:
        self.ds_model_config.rope_theta = self.model_config.rope_parameters["rope_theta"]
        module: nn.Module = super().create_module(config)
        return module


@dataclass(frozen=True)
class Policy:
    """One family's pair, and the blocks that it is for."""

    policy: type[TransformerPolicy]
    container: type[Any]
    blocks: tuple[type[nn.Module], ...]


POLICIES = {
    "gated": Policy(GatedPolicy, GatedContainer, (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)),
    "gpt2": Policy(HFGPT2LayerPolicy, _of_real_width(DS_GPT2Container), (GPT2Block,)),
    "opt": Policy(HFOPTLayerPolicy, _of_real_width(DS_OPTContainer), (OPTDecoderLayer,)),
    "gptj": Policy(HFGPTJLayerPolicy, _of_real_width(DS_GPTJContainer), (GPTJBlock,)),
    "gpt_neo": Policy(HFGPTNEOLayerPolicy, _of_real_width(DS_GPTNEOContainer), (GPTNeoBlock,)),
    "gpt_neox": Policy(NeoxPolicy, NeoxContainer, (GPTNeoXLayer,)),
}
"""By the name that :class:`~heretic_ds.placements.kernel_inject.families.Family` gives."""


@contextmanager
def only(policy: Policy) -> Iterator[None]:
    """Let DeepSpeed inject into this family's blocks, and know no other family, while the context lasts."""

    def with_blocks(block: nn.Module | None, inference: bool = True) -> TransformerPolicy:
        return policy.policy(block, inference=inference)

    with_blocks._orig_layer_class = list(policy.blocks)  # type: ignore[attr-defined]
    saved = {name: getattr(replace_module, name) for name in ("replace_policies", "policy_to_ds_container")}
    replace_module.replace_policies = [with_blocks]
    replace_module.policy_to_ds_container = lambda **arguments: policy.container(**arguments)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(replace_module, name, value)
        replace_module.container_g = None  # keeps the first block's weights alive otherwise


def forget() -> None:
    """Bring the counters, buffers and the workspace that DeepSpeed keeps in its classes back to their beginnings."""
    from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention
    from deepspeed.ops.transformer.inference.ds_mlp import DeepSpeedMLP

    workspace = DeepSpeedTransformerInference.workspace
    if workspace is not None and workspace.is_allocated():
        workspace.release_workspace()
    DeepSpeedTransformerInference.workspace = None
    DeepSpeedTransformerInference.layer_id = DeepSpeedSelfAttention.num_layers = 0
    DeepSpeedSelfAttention._qkv_buffers, DeepSpeedMLP._inter_w_buffers = [], []
    TransformerPolicy.hf_model_config = None
