"""Attention of one new token a row, without a copy of every key and value for each of the heads that share them.

Where several query heads share a key head, transformers repeats keys and values before PyTorch's attention as soon as
there is a mask: with 4 heads a key head that moves nine times the memory of the keys and values themselves, at every
step. With a single query position the heads that share keys can stand in the place of query positions instead.

Shapes: B rows, H query heads, J key heads, G = H / J, C columns, K width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "heretic_ds_per_key_head"


def per_key_head(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' function ``sdpa`` computes: query [B, H, 1, K], keys and values [B, J, C, K], gives
    [B, 1, H, K]; the mask is [B, 1, 1, C]."""
    rows, heads, queries, width = query.shape
    key_heads = key.shape[1]
    if queries != 1 or heads == key_heads or attention_mask is None or options.get("position_bias") is not None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return whole
    query_BJGK = query.reshape(rows, key_heads, heads // key_heads, width)
    output_BJGK = scaled_dot_product_attention(
        query_BJGK, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output_BJGK.reshape(rows, 1, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, per_key_head)


@contextmanager
def attention_per_key_head(model: PreTrainedModel) -> Iterator[None]:
    """While the context lasts, a model whose attention is ``sdpa`` uses :func:`per_key_head` for it, where it looks
    attention functions up in transformers' registry at all."""
    config: Any = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not model.is_backend_compatible():
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
