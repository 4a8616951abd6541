"""Rows of a batch in slots of memory that stays where it is, each row with its tokens from the first column on.

A step of decoding then reads and writes the same memory every time, with the same shapes, whatever rows there are:
what a captured graph needs. A row that comes takes a slot without moving the others. (transformers' own StaticCache
writes all rows at one common position, so that with rows that come later it would fill up with holes.)

A column of a slot is the position of its token, so that no padding has to be masked, only what comes after the row's
last token. A window of attention is a matter of the mask too: keys outside it stay in memory.

Shapes: R slots, C columns, B rows of a step, N rows that come, P positions of a prompt, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from heretic_ds.runner.caches import growing_cache
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.grouped_attention import attention_per_key_head


class _Part:
    """The part of the memory that a step works on."""

    rows, columns = 0, 0
    row_B: Tensor
    column_B: Tensor
    """Where each row's new key and value go."""


class SlotLayer(DynamicLayer):
    """Keys and values [R, H, C, K] of one layer."""

    def __init__(self, slots: int, columns: int, part: _Part) -> None:
        super().__init__()
        self._slots, self._columns, self._part = slots, columns, part

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for keys and values like these, zero: what is masked must still be a number."""
        for name, like in (("keys", key_states), ("values", value_states)):
            setattr(self, name, like.new_zeros(self._slots, like.shape[1], self._columns, like.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Write one key and value a row [B, H, 1, K] in its column; gives those of the part [B, H, C, K]."""
        part, given = self._part, []
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            if memory is None:
                raise RuntimeError("a step came before any prompt")
            view = memory[: part.rows, :, : part.columns]
            view[part.row_B, :, part.column_B] = states[:, :, 0]
            given.append(view)
        return given[0], given[1]

    def join(self, prompts: Any, column_NP: Tensor, slot_N: Tensor) -> None:
        """Copy a prompt cache's layer into slots; ``column_NP`` says which of its columns comes to lie where."""
        if not self.is_initialized:
            self.lazy_initialization(prompts.keys, prompts.values)
        for memory, states in ((self.keys, prompts.keys), (self.values, prompts.values)):
            index = column_NP[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
            memory[slot_N, :, : column_NP.shape[1]] = states.gather(2, index)  # type: ignore[index]

    def move(self, from_N: Tensor, to_N: Tensor, columns: int) -> None:
        """Copy the first columns of slots to others."""
        for memory in (self.keys, self.values):
            if memory is not None:
                memory[to_N, :, :columns] = memory[from_N, :, :columns]

    def get_seq_length(self) -> int:
        """A number that is the same at every step: positions are told to the model, not asked of the cache."""
        return max(self._part.columns - 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._part.columns, 0


class Slots:
    """Rows in flight: their keys and values, next tokens, positions, and trials."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        parameter = next(model.parameters())
        self.device = parameter.device
        self.token_R, self.next_R, self.position_R, self.trial_R = (
            torch.zeros(rows, dtype=torch.int64, device=self.device) for _ in range(4)
        )
        """Of each row: the token that the model sees next, at which position; what it answered to the token before;
        its trial."""
        self._model, self._forward, self._part = model, Forward(model), _Part()
        config = model.config.get_text_config(decoder=True)
        self._window: int | None = getattr(config, "sliding_window", None)
        kinds = [type(layer) for layer in DynamicCache(config=config).layers]
        self._slides = [kind is DynamicSlidingWindowLayer for kind in kinds]
        self._additive = parameter.dtype if config._attn_implementation == "eager" else None
        self._layers = [SlotLayer(rows, columns, self._part) for _ in kinds]
        self._cache = Cache(layers=list(self._layers))

    def prompt_cache(self) -> DynamicCache:
        """A cache for prompts that will join, which keeps all of their positions."""
        return growing_cache(self._model)

    def join(self, prompts: DynamicCache, lengths: Sequence[int], token_N: Tensor, slots: Sequence[int]) -> None:
        """Put rows with their first tokens into slots; prompts lie at the end of their cache's columns."""
        slot_N, length_N = self._numbers(slots), self._numbers(lengths)
        wide = prompts.get_seq_length()
        column_NP = (torch.arange(wide, device=self.device) + wide - length_N[:, None]).clamp_(max=wide - 1)
        for layer, other in zip(self._layers, prompts.layers, strict=True):
            if isinstance(other, DynamicLayer) and other.is_initialized:
                layer.join(other, column_NP, slot_N)
        self.token_R[slot_N], self.position_R[slot_N] = token_N, length_N

    def move(self, origins: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy rows, of which no more than the first columns are in use, to other slots."""
        from_N, to_N = self._numbers(origins), self._numbers(targets)
        for layer in self._layers:
            layer.move(from_N, to_N, columns)
        for each in (self.token_R, self.position_R):
            each[to_N] = each[from_N]

    def logits(self, rows: int, columns: int) -> Tensor:
        """Logits [B, V] that follow the tokens of the first rows, whose positions lie in the first columns.

        Changes nothing but the keys and values at those positions: called again, it gives the same.
        """
        part = self._part
        part.rows, part.columns = rows, columns
        column_C = torch.arange(columns, device=self.device)
        part.row_B = torch.arange(rows, device=self.device)
        part.column_B = self.position_R[:rows].clamp(max=columns - 1)  # a row that is done may have gone on too far
        position_B1 = part.column_B[:, None]
        with attention_per_key_head(self._model):
            logits_BV = self._forward(
                self.token_R[:rows, None],
                self._masks(column_C, position_B1),
                position_B1,
                past_key_values=self._cache,
                use_cache=True,
            )
        del part.row_B, part.column_B  # a graph's own memory
        return logits_BV

    def answer(self, rows: int, columns: int) -> None:
        """Note what follows the tokens of the first rows; see :meth:`logits`."""
        self.next_R[:rows] = self.logits(rows, columns).argmax(dim=-1)

    def advance(self, rows: int) -> None:
        """Make the answers of the first rows their next tokens."""
        self.token_R[:rows].copy_(self.next_R[:rows])
        self.position_R[:rows].add_(1)

    def _masks(self, column_C: Tensor, position_B1: Tensor) -> Any:
        """Which columns each row sees, [B, 1, 1, C]; by kind of layer where the kinds see different ones.

        The same kind of thing for any number of columns, also where no window leaves anything out: a model that cannot
        take it shows that at its first step.
        """
        seen_BC = column_C <= position_B1
        if self._window is None or not any(self._slides):
            return self._mask(seen_BC)
        near_BC = seen_BC & (column_C > position_B1 - self._window)
        if all(self._slides):
            return self._mask(near_BC)
        return {"full_attention": self._mask(seen_BC), "sliding_attention": self._mask(near_BC)}

    def _mask(self, seen_BC: Tensor) -> Tensor:
        seen_B11C = seen_BC[:, None, None]
        if self._additive is None:
            return seen_B11C
        hidden = torch.zeros_like(seen_B11C, dtype=self._additive)
        return hidden.masked_fill_(~seen_B11C, torch.finfo(self._additive).min)

    def _numbers(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)
