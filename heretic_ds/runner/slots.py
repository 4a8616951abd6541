"""Rows of a batch in slots of memory, each row with its tokens from the first column on.

A row that comes takes a slot without moving the others, and a step reads and writes the same memory whatever rows there
are: what a captured graph needs. (transformers' own StaticCache writes all rows at one common position, so that with
rows that come later it would fill up with holes.)

A column of a slot is the position of its token, so that no padding has to be masked, only what comes after the row's
last token. A window of attention is a matter of the mask too: keys outside it stay in memory.

Shapes: R slots, C columns, B rows of a step, N rows that come, S columns of a prompt cache, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from heretic_ds.runner.forward import Begun, Forward, rope_depends_on_length
from heretic_ds.runner.grouped_attention import attention_per_key_head

_MASKED_ATTENTION = frozenset({"eager", "sdpa"})
"""Implementations of attention that take a mask of what each row sees."""
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


class _Part:
    """The part of the memory that a step works on."""

    rows, columns = 0, 0
    row_B: Tensor
    column_B: Tensor
    """Where each row's new key and value go."""


class SlotLayer(DynamicLayer):
    """Keys and values [R, H, C, K] of one layer."""

    def __init__(self, part: _Part) -> None:
        super().__init__()
        self._part = part

    def reserve(self, slots: int, columns: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Have memory for so many slots and columns, zero where nothing was written: what is masked must still be a
        number. The first time it is taken ``like`` some keys and values."""
        olds = (self.keys, self.values) if self.is_initialized else like
        if olds is None:
            return
        for name, old in zip(("keys", "values"), olds, strict=True):
            assert old is not None
            memory = old.new_zeros(slots, old.shape[1], columns, old.shape[-1])
            if self.is_initialized:
                memory[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, memory)
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

    def join(self, prompts: Any, column_NS: Tensor, slot_N: Tensor | slice) -> None:
        """Copy a prompt cache's layer into slots; ``column_NS`` says which of its columns comes to lie where."""
        for memory, states in ((self.keys, prompts.keys), (self.values, prompts.values)):
            rows, heads, columns, width = states.shape
            line_NH = torch.arange(rows * heads, device=states.device).view(rows, heads)
            index_NHS = columns * line_NH[:, :, None] + column_NS[:, None]  # whole lines: seven times as fast as gather
            lines = states.reshape(-1, width).index_select(0, index_NHS.reshape(-1))
            memory[slot_N, :, : column_NS.shape[1]] = lines.view(rows, heads, -1, width)  # type: ignore[index]

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

    def __init__(self, forward: Forward, rows: int, columns: int) -> None:
        self._forward, self._part, self.device = forward, _Part(), forward.device
        self.rows = self.columns = 0
        self.token_R, self.next_R, self.position_R, self.trial_R = (
            torch.zeros(0, dtype=torch.int64, device=self.device) for _ in range(4)
        )
        """Of each row: the token that the model sees next, at which position; what it answered to the token before;
        its trial."""
        config: Any = forward.model.config.get_text_config(decoder=True)
        self._window: int | None = getattr(config, "sliding_window", None)
        self._slides = [kind is DynamicSlidingWindowLayer for kind in forward.layer_kinds]
        self._additive = forward.model.dtype if config._attn_implementation == "eager" else None
        self._layers = [SlotLayer(self._part) for _ in self._slides]
        self._cache = Cache(layers=list(self._layers))
        self.reserve(rows, columns)

    def reserve(self, rows: int, columns: int) -> None:
        """Have room for at least so many rows of so many columns; the rows in flight stay. A captured graph does not
        notice that memory has moved."""
        if rows <= self.rows and columns <= self.columns:
            return
        self.rows, self.columns = max(rows, self.rows), max(columns, self.columns)
        for name in ("token_R", "next_R", "position_R", "trial_R"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(self.rows - len(old))]))
        for layer in self._layers:
            layer.reserve(self.rows, self.columns)

    def join(self, begun: Begun, prompts: DynamicCache, token_N: Tensor, slots: Sequence[int]) -> None:
        """Put rows that have begun, with their first tokens, into slots; ``prompts`` has their keys and values."""
        slot_N, length_N = self._numbers(slots), begun.mask_BS.sum(dim=1)
        beside = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        at = slice(slots[0], slots[0] + len(slots)) if beside else slot_N  # slices are copied in half the time
        column_NS = begun.mask_BS.argsort(dim=1, descending=True, stable=True)[:, : int(length_N.max())]
        for layer, other in zip(self._layers, prompts.layers, strict=True):
            if isinstance(other, DynamicLayer) and other.is_initialized:
                if not layer.is_initialized:
                    layer.reserve(self.rows, self.columns, (other.keys, other.values))  # type: ignore[arg-type]
                layer.join(other, column_NS, at)
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
        with attention_per_key_head(self._forward.model):
            mask = self._masks(column_C, position_B1)
            logits_BV = self._forward.logits(self.token_R[:rows, None], mask, position_B1, self._cache)
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


def obstacle(forward: Forward) -> str | None:
    """Why a model's rows cannot lie in slots; None where nothing is known against it."""
    config: Any = forward.model.config.get_text_config(decoder=True)
    if not forward.keeps_positions:
        own = {kind.__name__ for kind in forward.layer_kinds} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
        return f"the model's cache has layers with a state of their own ({', '.join(sorted(own))})"
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        return f"the model has layers of {', '.join(sorted(kinds))}"
    if not forward.takes_positions:
        return "the model takes positions from the mask alone"
    if config._attn_implementation not in _MASKED_ATTENTION:
        return f"the attention {config._attn_implementation} takes no mask of what each row sees"
    if rope_depends_on_length(config):
        return "the model's rotary frequencies depend on the longest row"
    return None
