"""What stands between transformers' loop over blocks and DeepSpeed's injected ones.

Injected blocks keep keys and values in the kernels' workspace and number tokens themselves. So the adapter sees each
pass of the decoder first, tells a prompt from its continuation, makes room, and gives blocks the one kind of mask that
they read; the cache that transformers passes along is left holding the number of each row in the workspace instead of
keys and values, so that whoever drops or reorders its rows reorders those of the workspace with it.

Shapes: B rows, S positions of this pass, T positions so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heretic_ds.placements.kernel_inject.workspace import Workspace

_OVERRUN_BYTES = 4096
"""Memory behind a stream that kernels of norms may read, and that of RMS norms writes: up to 256 threads with 16 bytes
each. Where rows are narrow a block of threads takes several, and what it takes beyond the last one is normed too."""
_MASKED = -10000.0
"""What the kernels add to the score of a position that is not to be seen."""


class Adapter:
    """The passes of one injected decoder."""

    def __init__(self, workspace: Workspace) -> None:
        self.mask_BT: Tensor | None = None
        """Added to attention scores in the pass at hand; None where every position may be seen."""
        self._workspace = workspace
        self._new_tokens = 0
        self._blocks: list[InjectedBlock] = []
        self._cache: Any = None
        self._row_numbers: Tensor | None = None
        self._length = 0
        self._padded = False

    def attach(self, decoder: nn.Module, blocks: list[InjectedBlock]) -> None:
        """Watch the passes of ``decoder``, whose blocks are ``blocks``."""
        self._blocks = blocks
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        decoder.register_forward_hook(self._after)

    @contextmanager
    def expecting(self, new_tokens: int) -> Iterator[None]:
        """Make room for ``new_tokens`` after each prompt that is passed while the context lasts."""
        before, self._new_tokens = self._new_tokens, new_tokens
        try:
            yield
        finally:
            self._new_tokens = before

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise RuntimeError("injected blocks are given token ids, not embeddings")
        cache, mask_BT = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        seen = cache.get_seq_length() if cache is not None else 0
        if seen == 0:
            self._begin(ids, mask_BT)
        else:
            self._go_on(ids, cache, seen)
        self._cache = cache
        self._length = seen + ids.shape[1]
        self.mask_BT = None
        if self._padded and mask_BT is not None:
            if mask_BT.shape != (ids.shape[0], self._length):
                raise RuntimeError(f"a mask of {tuple(mask_BT.shape)} for {ids.shape[0]} rows of {self._length} tokens")
            self.mask_BT = ((mask_BT == 0).to(self._blocks[0].dtype) * _MASKED).contiguous()

    def _begin(self, ids_BS: Tensor, mask_BT: Tensor | None) -> None:
        rows, length = ids_BS.shape
        if self._workspace.make_room(rows, length, self._new_tokens):
            for block in self._blocks:
                block.past = None  # views of a workspace that is no more
        self._padded = mask_BT is not None and bool((mask_BT == 0).any())
        if length == 1:
            self._workspace.start_over()

    def _go_on(self, ids_BS: Tensor, cache: Any, seen: int) -> None:
        """Check that the pass continues the last one by one token, and let the workspace's rows follow the cache's."""
        rows, length = ids_BS.shape
        if cache is not self._cache or seen != self._length or length != 1:
            raise RuntimeError("injected blocks can only go on with the prompts of the last pass, one token at a time")
        if seen + length > self._workspace.tokens:
            raise RuntimeError(f"the workspace was made for {self._workspace.tokens} tokens and is full")
        numbers = cache.layers[0].keys
        if numbers is not self._row_numbers:
            self._reorder(numbers[:, 0, -1, 0])
        if rows != cache.layers[0].keys.shape[0]:
            raise RuntimeError(f"{rows} rows go on, and the cache has {cache.layers[0].keys.shape[0]}")

    def _reorder(self, number_B: Tensor) -> None:
        for block in self._blocks:
            for kept in block.past or ():
                kept[: len(number_B)].copy_(kept[number_B])

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the pass in transformers' cache."""
        if self._cache is None:
            return
        hidden_BSD = output.last_hidden_state
        rows, length = hidden_BSD.shape[:2]
        number_B = torch.arange(rows, device=hidden_BSD.device)
        numbers = number_B.view(rows, 1, 1, 1).expand(rows, 1, length, 1)
        self._cache.update(numbers, numbers, 0)
        self._row_numbers = self._cache.layers[0].keys


class InjectedBlock(nn.Module):
    """One of DeepSpeed's blocks in the place of one of transformers', called and answering as that was."""

    injected: Any
    """One of DeepSpeed's blocks; its attributes are declared nowhere."""

    def __init__(self, injected: nn.Module, adapter: Adapter, returns_pair: bool) -> None:
        super().__init__()
        self.injected = injected
        self._adapter, self._returns_pair = adapter, returns_pair
        self.injected._should_allocate_workspace = False  # the adapter does, and more than once

    @property
    def past(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, heads, T, head size] after the last pass, as views of the workspace."""
        views: tuple[Tensor, Tensor] | None = self.injected.layer_past
        return views

    @past.setter
    def past(self, views: tuple[Tensor, Tensor] | None) -> None:
        self.injected.layer_past = views

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.injected.attention.attn_ow.dtype
        return dtype

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """The stream after this block [B, S, D]."""
        # A copy, since the kernels write into what they are given, and others may hold it; and behind it.
        size = hidden_states.numel()
        memory = hidden_states.new_empty(size + _OVERRUN_BYTES // hidden_states.element_size())
        hidden_BSD = memory[:size].view(hidden_states.shape)
        hidden_BSD.copy_(hidden_states)
        output_BSD = self.injected(hidden_BSD, attention_mask=self._adapter.mask_BT, use_cache=False)[0]
        return (output_BSD, None) if self._returns_pair else output_BSD


class ResidualSum(nn.Module):
    """The sum that ends a block with RMS norms.

    The kernel before it has added the attention's output to the stream in place; DeepSpeed's own sum adds it again.
    """

    def forward(self, hidden_state: Tensor, residual: Tensor, **others: Any) -> Tensor:
        """The stream [B, S, D] with the MLP's output added."""
        return residual + hidden_state
