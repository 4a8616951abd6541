"""Rows of a key-value cache that come and go while the others are decoded.

Possible where every layer keeps all keys and values in plain tensors that grow by one position a step. Layers with a
window or a state of their own lose rows only.

Shapes: B rows, H heads, S positions, K width of a key or value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 32
"""Positions for which memory is taken at once."""

POSITIONAL_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of layers of a growing cache that hold keys and values by position, and no other state."""


class RoomyLayer(DynamicLayer):
    """A growing layer that takes memory for several positions at once, instead of copying everything for each one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._memory: tuple[Tensor, Tensor] | None = None
        self._first = 0
        """Column of the memory with which the layer begins."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, S, K]; gives all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, seen, new = len(key_states), self.get_seq_length(), key_states.shape[2]
        if self._memory is None or self._first + seen + new > self._memory[0].shape[2]:
            old = (self.keys, self.values) if seen else (None, None)
            self._memory = (_roomier(old[0], key_states, seen + new), _roomier(old[1], value_states, seen + new))
            self._first = 0
        start = self._first + seen
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:rows, :, start : start + new] = states
        self.keys, self.values = (memory[:rows, :, self._first : start + new] for memory in self._memory)
        return self.keys, self.values

    def shrink(self, origin_N: Tensor, target_N: Tensor, rows: int, width: int) -> None:
        """Leave the first rows, and the last ``width`` columns, after some rows have been put in others' places."""
        if self._memory is None or self.keys is None:
            return
        end = self._first + self.keys.shape[2]
        self._first = max(self._first, end - width)
        for memory in self._memory:
            used = memory[:, :, self._first : end]
            used.index_copy_(0, target_N, used.index_select(0, origin_N))
        self.keys, self.values = (memory[:rows, :, self._first : end] for memory in self._memory)

    def hold(self, memory_BHCK: tuple[Tensor, Tensor], length: int) -> None:
        """Take over memory of keys and of values, of which the first ``length`` columns are in use."""
        keys_BHCK, values_BHCK = memory_BHCK
        if not self.is_initialized:
            self.lazy_initialization(keys_BHCK, values_BHCK)
        self._memory, self._first = memory_BHCK, 0
        self.keys, self.values = keys_BHCK[:, :, :length], values_BHCK[:, :, :length]

    def let_go(self) -> None:
        """Hold nothing any longer."""
        self.keys = self.values = self._memory = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Leave the rows of these numbers."""
        if self.keys is not None and self.values is not None:
            keys, values = (each.index_select(0, beam_idx) for each in (self.keys, self.values))
            self.hold((keys, values), keys.shape[2])


class Padded(NamedTuple):
    """Rows of a batch with padding before them, and where tokens that all rows share come to lie there."""

    row_N1: Tensor
    column_NP: Tensor

    @classmethod
    def of(cls, padding: Sequence[int], shared: int, device: torch.device) -> Padded:
        """From the number of columns of each row that are padding, and that of shared tokens."""
        row_N1 = torch.tensor([[row] for row, columns in enumerate(padding) if columns], dtype=torch.int64)
        column_N1 = torch.tensor([[columns] for columns in padding if columns], dtype=torch.int64)
        column_NP = column_N1.view(-1, 1) + torch.arange(shared)
        return cls(row_N1.view(-1, 1).to(device), column_NP.to(device))


class StartedLayer(DynamicLayer):
    """A layer for one pass, whose rows begin with tokens that have been passed over before.

    A row's padding comes first, then the keys and values of those tokens, then what the pass adds.
    """

    def __init__(self, shared_THPK: tuple[Tensor, Tensor], trial_B: Tensor | None, padded: Padded) -> None:
        """The shared tokens' keys and values are those of the trial of each row; of one trial alone without."""
        super().__init__()
        self._shared, self._trial_B, self._padded = shared_THPK, trial_B, padded
        self.memory: tuple[Tensor, Tensor] | None = None
        """Keys and values, with room behind them; None until the pass has come to the layer."""

    def get_seq_length(self) -> int:
        return self._shared[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, H, S, K] behind those shared; gives all of them."""
        self.lazy_initialization(key_states, value_states)
        keys, values = (
            _behind(shared if self._trial_B is None else shared[self._trial_B], new, self._padded)
            for shared, new in zip(self._shared, (key_states, value_states), strict=True)
        )
        length = self.get_seq_length() + key_states.shape[2]
        self.memory = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values


def _behind(shared_BHPK: Tensor, new_BHSK: Tensor, padded: Padded) -> Tensor:
    """New columns behind shared ones, which in padded rows come to lie in other columns; with room behind."""
    rows, heads, length, size = new_BHSK.shape
    shared = shared_BHPK.shape[2]
    memory_BHCK = new_BHSK.new_empty(rows, heads, shared + length + _ROOM, size)
    memory_BHCK[:, :, :shared] = shared_BHPK  # also where padding will be, which has to be numbers
    memory_BHCK[:, :, shared : shared + length] = new_BHSK
    own_NHPK = shared_BHPK if len(shared_BHPK) == 1 else shared_BHPK[padded.row_N1[:, 0]]
    memory_BHCK[padded.row_N1, :, padded.column_NP] = own_NHPK.transpose(1, 2)
    return memory_BHCK


def _roomier(old_BHSK: Tensor | None, like_BHSK: Tensor, length: int) -> Tensor:
    rows, heads, _, size = like_BHSK.shape
    memory_BHSK = like_BHSK.new_empty(rows, heads, length + _ROOM, size)
    if old_BHSK is not None:
        memory_BHSK[:, :, : old_BHSK.shape[2]] = old_BHSK
    return memory_BHSK


def new_cache(model: PreTrainedModel, roomy: bool = False) -> DynamicCache:
    """An empty cache of the kinds of layers that the model has; growing ones ``roomy`` on demand."""
    kinds = _layer_kinds(model)
    if set(kinds) == {DynamicLayer}:  # most models' caches, made in a tenth of the time
        return cache_of([RoomyLayer() if roomy else DynamicLayer() for _ in kinds])
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if roomy:
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


_kinds: WeakKeyDictionary[PreTrainedModel, tuple[type, ...]] = WeakKeyDictionary()


def _layer_kinds(model: PreTrainedModel) -> tuple[type, ...]:
    """The kinds of layers of the model's own cache."""
    if model not in _kinds:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        _kinds[model] = tuple(map(type, cache.layers))
    return _kinds[model]


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that keeps the keys and values of all positions, also where the model's own has a window."""
    return cache_of([DynamicLayer() for _ in _layer_kinds(model)])


def cache_of(layers: list[Any]) -> DynamicCache:
    """A cache with these layers."""
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = layers, None
    return cache


def keeps_positions(model: PreTrainedModel) -> bool:
    """Whether all that a model's cache holds is keys and values by position."""
    return set(_layer_kinds(model)) <= set(POSITIONAL_LAYERS)


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H, S, K] of every layer. Raises NotImplementedError where one has none of its
    own, as in models whose blocks share them; passes over such prompts have to be whole."""
    layers: list[Any] = cache.layers
    without = [block for block, layer in enumerate(layers) if not layer.is_initialized]
    if without:
        raise NotImplementedError(f"the blocks {without} have no keys of their own")
    return [(layer.keys, layer.values) for layer in layers]


def takes_rows(cache: DynamicCache) -> bool:
    """Whether rows can be added to a cache in use."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)


def take(cache: DynamicCache, block: int, memory_BHCK: tuple[Tensor, Tensor], length: int) -> None:
    """Give an empty layer of a cache the first ``length`` columns of keys and values."""
    layer = cache.layers[block]
    if isinstance(layer, RoomyLayer):
        layer.hold(memory_BHCK, length)
    else:
        keys, values = memory_BHCK
        cache.update(keys[:, :, :length], values[:, :, :length], block)


def join_rows(cache: DynamicCache, keep: Sequence[int], added: Sequence[DynamicCache], width: int) -> None:
    """Leave the rows ``keep`` and append those of other caches, all ending at the last of ``width`` positions; what
    is missing before them is masked, and therefore zero here. The other caches are empty afterwards."""
    layers: Any = zip(cache.layers, *(other.layers for other in added), strict=True)
    for layer, *others in layers:
        if layer.is_initialized:
            keys = _joined(layer.keys, keep, [other.keys for other in others], width)
            layer.hold((keys, _joined(layer.values, keep, [other.values for other in others], width)), width)
            for other in others:  # what a layer has taken makes room for the next one's
                other.let_go()


def _joined(states_BHSK: Tensor, keep: Sequence[int], added: Sequence[Tensor], width: int) -> Tensor:
    """Memory with room behind the rows' columns."""
    kept_BHSK = states_BHSK[:, :, -width:]
    if list(keep) != list(range(len(kept_BHSK))):
        kept_BHSK = kept_BHSK.index_select(0, torch.tensor(keep, dtype=torch.int64, device=kept_BHSK.device))
    parts, row = [kept_BHSK, *added], 0
    _, heads, _, size = states_BHSK.shape
    joined_BHCK = states_BHSK.new_empty(sum(len(part) for part in parts), heads, width + _ROOM, size)
    for part in parts:
        rows_BHCK, missing = joined_BHCK[row : row + len(part)], width - part.shape[2]
        rows_BHCK[:, :, :missing] = 0
        rows_BHCK[:, :, missing:width] = part
        row += len(part)
    return joined_BHCK


def pad_columns(mask_BS: Tensor, width: int) -> Tensor:
    """The last ``width`` columns of a mask, or all behind as many zeros as are missing."""
    missing = width - mask_BS.shape[1]
    return torch.nn.functional.pad(mask_BS, (missing, 0)) if missing > 0 else mask_BS[:, mask_BS.shape[1] - width :]
