"""Forward passes as scoring and decoding need them: logits of the last positions alone.

Shapes: B rows, S positions, V vocabulary, H heads, K width of a key or value, L blocks, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from heretic_ds.prompts import pad_left
from heretic_ds.runner.rows import Row

_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class TakesTrials(Protocol):
    """Edits of outputs, which have to know whose output is whose."""

    def assign(self, trials: Sequence[int], into: Tensor | None = None) -> None:
        """The trial of each row of the coming passes; captured steps read it ``into`` memory that stays."""
        ...


@dataclass(frozen=True)
class Begun:
    """What a pass over prompts leaves behind: rows end at the last column; padding may lie anywhere before."""

    logits_BV: Tensor
    """Of the first answer token; [B, S, V] where the last S positions were asked for."""
    mask_BS: Tensor
    position_B1: Tensor
    """Of each row's last token."""


class Forward:
    """A model's forward pass, with the arguments it takes; here all of the model takes part in it.

    Where ranks hold different blocks, placements derive from this: only one rank knows the logits then.
    """

    knows_logits = True
    """Whether the logits of a pass are the model's on this rank."""

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model, self._pad_id = model, pad_id
        parameters = inspect.signature(model.forward).parameters
        takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._optional = {name for name in ("position_ids", "logits_to_keep") if takes_anything or name in parameters}
        kept = parameters.get("logits_to_keep")
        self._takes_places = kept is not None and "Tensor" in str(kept.annotation)
        """Whether the positions whose logits are wanted can be told one by one."""
        self.takes_positions = "position_ids" in parameters
        """Whether tokens' positions can be told, instead of following from the mask."""
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.layer_kinds: list[type] = [type(layer) for layer in cache.layers]
        """Of the model's own cache."""
        self.edits: TakesTrials | None = None
        """Edits of outputs that are active; None where all rows have one trial."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def keeps_positions(self) -> bool:
        """Whether all that the model's cache holds is keys and values by position."""
        return set(self.layer_kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}

    def assign(self, rows: Sequence[Row], into: Tensor | None = None) -> None:
        """Tell the edits which trial each row of the coming passes has."""
        if self.edits is not None:
            self.edits.assign([row.trial for row in rows], into)

    def logits(
        self, input_ids_BS: Tensor, mask_BS: Any, position_ids_BS: Tensor, cache: Any = None, last: int | None = None
    ) -> Tensor:
        """Logits [B, V] of the last position, or [B, last, V] of the last ones; ``cache`` takes keys and values."""
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if "position_ids" in self._optional:
            options["position_ids"] = position_ids_BS
        if "logits_to_keep" in self._optional:
            options["logits_to_keep"] = self._wanted(input_ids_BS, last or 1)
        logits: Tensor = self.model(input_ids=input_ids_BS, attention_mask=mask_BS, **options).logits
        return logits[:, -1] if last is None else logits[:, -last:]

    def _wanted(self, input_ids_BS: Tensor, last: int) -> int | Tensor:
        """The last positions: how many, or where they are. A slice of many rows does not lie in one piece, and PyTorch
        then multiplies frozen weights row by row, reading all of them each time; what is picked by places does."""
        if last >= input_ids_BS.shape[1] or not self._takes_places:
            return last
        return torch.arange(-last, 0, device=input_ids_BS.device)  # weights of streamed models are on meta

    def __call__(self, rows: Sequence[Row], cache: DynamicCache | None = None, last: int | None = None) -> Begun:
        """One pass over the prompts of a batch, whose keys and values an empty ``cache`` takes."""
        self.assign(rows)
        batch = pad_left([row.prompt for row in rows], self._pad_id).to(self.device)
        ids_BS, mask_BS, position_BS = batch.input_ids_BS, batch.attention_mask_BS, batch.position_ids_BS
        return Begun(self.logits(ids_BS, mask_BS, position_BS, cache, last), mask_BS, position_BS[:, -1:])

    def parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """A batch in the parts that are in the model's hands side by side; each is a pass."""
        return [rows]

    def choose(self, logits_BV: Tensor) -> Callable[[], Tensor]:
        """Find the likeliest next token of each row; what is returned gives them, [B], once they are asked for."""
        token_B = logits_BV.argmax(dim=-1)
        return lambda: token_B

    def told(self, values: Tensor) -> Tensor:
        """Numbers on the host that were made of logits, from the rank that knows these."""
        return values

    def joined(self, stream_LD: Tensor) -> Tensor:
        """A table on the host over the L+1 entries of the stream, of which this rank may have seen a part."""
        return stream_LD

    def step(self, begun: Begun, token_B: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, V] after one more token of each row."""
        mask_BS = torch.nn.functional.pad(begun.mask_BS, (0, 1), value=1)
        return self.logits(token_B[:, None], mask_BS, begun.position_B1 + 1, cache)

    def own_cache(self) -> DynamicCache:
        """An empty cache of the model's own kinds of layers."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def growing_cache(self) -> DynamicCache:
        """An empty cache that keeps the keys and values of all positions, also where the model's own has a window."""
        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = [DynamicLayer() for _ in self.layer_kinds], None
        return cache


def rope_depends_on_length(config: Any) -> bool:
    """Whether a decoder's rotary frequencies depend on the longest row of a batch."""
    return bool(_rope_types(getattr(config, "rope_parameters", None)) & _LENGTH_DEPENDENT_ROPE)


def _rope_types(parameters: Any) -> set[str]:
    """All types of rotary positions in a configuration, which may have one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = (_rope_types(value) for value in parameters.values())
    return set.union({str(parameters.get("rope_type", "default"))}, *nested)
