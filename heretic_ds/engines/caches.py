"""Rows of a key-value cache that come and go while the others are decoded.

Possible where every layer keeps all keys and values in plain tensors that grow by one position a step. Layers with a
window or a state of their own lose rows only.

Shapes: B rows, H heads, S positions, K width of a key or value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kinds of layers that the model has."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def takes_rows(cache: DynamicCache) -> bool:
    """Whether rows can be added to a cache in use."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def add_rows(cache: DynamicCache, keep_B: Tensor, added: DynamicCache, width: int) -> None:
    """Leave the rows ``keep_B`` and append those of another cache, all of them ending at the last of ``width``
    positions; what is missing before them is masked, and therefore zero here."""
    layers: Any = zip(cache.layers, added.layers, strict=True)
    for layer, other in layers:
        if layer.is_initialized:
            layer.keys = _joined(layer.keys, keep_B, other.keys, width)
            layer.values = _joined(layer.values, keep_B, other.values, width)


def _joined(states_BHSK: Tensor, keep_B: Tensor, added_BHSK: Tensor, width: int) -> Tensor:
    kept, (_, heads, _, size) = len(keep_B), states_BHSK.shape
    joined_BHSK = states_BHSK.new_zeros(kept + len(added_BHSK), heads, width, size)
    states_BHSK = states_BHSK[:, :, -width:].index_select(0, keep_B)
    joined_BHSK[:kept, :, width - states_BHSK.shape[2] :] = states_BHSK
    joined_BHSK[kept:, :, width - added_BHSK.shape[2] :] = added_BHSK
    return joined_BHSK


def pad_columns(mask_BS: Tensor, width: int) -> Tensor:
    """The last ``width`` columns of a mask, or all behind as many zeros as are missing."""
    missing = width - mask_BS.shape[1]
    return torch.nn.functional.pad(mask_BS, (missing, 0)) if missing > 0 else mask_BS[:, mask_BS.shape[1] - width :]
