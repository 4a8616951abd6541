"""Models of public shapes without memory for their weights, as a planner sees them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heretic_ds.anatomy import find_anatomy
from heretic_ds.checkpoint.skeleton import parameters_on_meta
from heretic_ds.placements.costs import Facts, Work

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1B": (  # Llama 3.2 1B
        "llama",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "8B": (  # Llama 3.1 8B
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "14B": (  # Qwen3 14B
        "qwen3",
        {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    ),
    "32B": (  # Qwen3 32B
        "qwen3",
        {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    ),
    "70B": (  # Llama 3.1 70B
        "llama",
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "405B": (  # Llama 3.1 405B
        "llama",
        {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
         "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "8x7B": (  # Mixtral 8x7B, 47 billion parameters
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000},
    ),
    "30B-A3B": (  # Qwen3 30B-A3B
        "qwen3_moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "vocab_size": 151936},
    ),
    "235B-A22B": (  # Qwen3 235B-A22B
        "qwen3_moe",
        {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
         "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "vocab_size": 151936},
    ),
    "671B": (  # DeepSeek-V3: the defaults of its configuration
        "deepseek_v3",
        {},
    ),
    "1T": (  # DeepSeek-V3's layout with the published numbers of Kimi K2
        "deepseek_v3",
        {"n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840,
         "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
}  # fmt: skip
"""Family and configuration by name; numbers are those of the published ``config.json``."""


@cache
def planned(name: str, dtype: torch.dtype = torch.bfloat16) -> Facts:
    """The facts of one of :data:`SHAPES` with a usual job: 2 x 400 prompts to learn from, 100 of each kind to score."""
    kind, shape = SHAPES[name]
    return facts_for(name, AutoConfig.for_model(kind, **shape), dtype)


def facts_for(name: str, config: Any, dtype: torch.dtype = torch.bfloat16, work: Work | None = None) -> Facts:
    """The facts of a model of some configuration."""
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    anatomy = find_anatomy(model)
    experts = any(writer.experts is not None for writer in anatomy.writers)
    return Facts(name, model, anatomy, dtype, work or Work(), merges_experts=experts)
