"""Forward passes as scoring and decoding need them: logits of the last position alone.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.prompts import TokenRows, pad_left

_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class Forward:
    """The model's forward pass reduced to last-position logits, with the arguments it takes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._optional = {name for name in ("position_ids", "logits_to_keep") if takes_anything or name in parameters}
        self.takes_positions = "position_ids" in parameters
        """Whether tokens' positions can be told, instead of following from the mask."""

    def __call__(self, input_ids_BS: Tensor, mask_BS: Any, position_ids_BS: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, V] of the last position."""
        if "position_ids" in self._optional:
            kwargs["position_ids"] = position_ids_BS
        if "logits_to_keep" in self._optional:
            kwargs["logits_to_keep"] = 1
        logits: Tensor = self._model(input_ids=input_ids_BS, attention_mask=mask_BS, **kwargs).logits
        return logits[:, -1]


@dataclass(frozen=True)
class Begun:
    """What a pass over prompts leaves behind: rows end at the last column, padding lies before them."""

    logits_BV: Tensor
    """Of the first answer token."""
    mask_BS: Tensor
    position_B1: Tensor
    """Of each row's last token."""


class Prefill:
    """Passes over whole prompts, with which answers begin."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self._model, self._pad_id, self._forward = model, pad_id, Forward(model)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def __call__(self, rows: TokenRows, cache: DynamicCache | None = None) -> Begun:
        """One pass over a batch of prompts, whose keys and values an empty ``cache`` takes."""
        batch = pad_left(rows, self._pad_id).to(self._device)
        kept: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            kept = {"past_key_values": cache, "use_cache": True}
        logits_BV = self._forward(batch.input_ids_BS, batch.attention_mask_BS, batch.position_ids_BS, **kept)
        return Begun(logits_BV, batch.attention_mask_BS, batch.position_ids_BS[:, -1:])

    def step(self, begun: Begun, token_B: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, V] after one more token of each row."""
        mask_BS = torch.nn.functional.pad(begun.mask_BS, (0, 1), value=1)
        return self._forward(token_B[:, None], mask_BS, begun.position_B1 + 1, past_key_values=cache, use_cache=True)


def rope_depends_on_length(config: Any) -> bool:
    """Whether a decoder's rotary frequencies depend on the longest row of a batch."""
    return bool(_rope_types(getattr(config, "rope_parameters", None)) & _LENGTH_DEPENDENT_ROPE)


def _rope_types(parameters: Any) -> set[str]:
    """All types of rotary positions in a configuration, which may have one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = (_rope_types(value) for value in parameters.values())
    return set.union({str(parameters.get("rope_type", "default"))}, *nested)


def last_logits(model: PreTrainedModel, prompts: TokenRows, pad_id: int) -> Tensor:
    """Logits [B, V] of the first answer token of each prompt."""
    return Prefill(model, pad_id)(prompts).logits_BV
