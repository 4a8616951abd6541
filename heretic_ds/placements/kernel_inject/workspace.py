"""The kernels' workspace: one block of memory for activations, attention scores and the keys and values of all tokens.

The kernels take its size once and check nothing: rows or tokens beyond it are written over other memory. So every
pass states what it needs here first. Sizes follow ``inference_context.h`` of DeepSpeed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from heretic_ds.errors import UserError
from heretic_ds.memory import release_memory
from heretic_ds.placements.kernel_inject.families import inner_width, most_tokens, refuse_long

_ACTIVATIONS = 10
"""Activations [rows, tokens, width] that the workspace has room for before keys and values begin."""
_BESIDE_INNER = 3
"""Of them, those that an MLP holds beside its inner activations."""
_COUNTED = 2**31
"""The kernels count the numbers of a pass in 32 bits: attention scores, inner activations, keys."""
_SPARE_BYTES = 600 << 20
"""Device memory that DeepSpeed wants left free beside the workspace, and some more."""


@dataclass(frozen=True)
class Shape:
    """What the size of a workspace depends on."""

    width: int
    heads: int
    layers: int
    inner: int
    """Numbers that an MLP's first product gives for each token; gated ones give two for each inner one."""
    itemsize: int
    limit: int | None
    """Longest sequence that the kernels compute rightly, answer included."""

    @classmethod
    def of(cls, config: PreTrainedConfig, layers: int, dtype: torch.dtype, gated: bool) -> Shape:
        """The shape of a model's workspace."""
        inner = inner_width(config) * (2 if gated else 1)
        heads, width = config.num_attention_heads, config.hidden_size
        return cls(width, heads, layers, inner, dtype.itemsize, most_tokens(config))

    def tokens_for(self, prompt: int, new: int) -> int:
        """Tokens a row that a workspace needs for prompts of ``prompt`` tokens with ``new`` ones to come.

        More than their sum where the MLP is so wide that the prompt's activations would reach into keys and values.
        """
        activations = _BESIDE_INNER + self.inner / self.width
        return max(prompt + new, math.ceil(prompt * activations / _ACTIVATIONS))

    def counted(self, prompt: int, tokens: int) -> int:
        """Most numbers of one kind that the kernels count for a row: of attention scores, inner activations, keys."""
        return max(self.heads * prompt * prompt, prompt * self.inner, tokens * self.width)

    def refuse_uncounted(self, prompt: int, new: int) -> None:
        """Raise UserError where the kernels cannot even count what one prompt takes."""
        if self.counted(prompt, self.tokens_for(prompt, new)) >= _COUNTED:
            raise UserError(
                f"evaluate=kernel_inject counts in 32 bits, too few for a prompt of {prompt} tokens; "
                "set evaluate=tensor_parallel"
            )

    def bytes_for(self, rows: int, tokens: int) -> int:
        """Bytes of device memory that a workspace for ``rows`` of ``tokens`` takes."""
        head = self.width // self.heads
        padded = next((size for size in (32, 64, 128) if head <= size), head)
        kept = (_ACTIVATIONS + 2 * self.layers) * self.heads * padded
        return rows * (kept + self.heads * tokens) * tokens * self.itemsize


class Workspace:
    """Keeps the kernels' workspace as large as each pass needs it."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.rows = self.tokens = 0
        self._device = device
        self._bytes = 0

    def make_room(self, rows: int, prompt: int, new: int) -> bool:
        """Provide for a pass over ``rows`` prompts of ``prompt`` tokens, with ``new`` tokens each to come.

        Says whether the workspace was laid out anew, whatever it held being lost. Raises UserError for sequences that
        the kernels do not compute, torch.OutOfMemoryError where the device has no room, or fewer rows could be counted.
        """
        refuse_long(prompt + new, self.shape.limit)
        tokens = self.shape.tokens_for(prompt, new)
        self.shape.refuse_uncounted(prompt, new)
        if rows * self.shape.counted(prompt, tokens) >= _COUNTED:
            raise torch.OutOfMemoryError(f"the kernels count in 32 bits, too few for {rows} rows of {prompt} tokens")
        if rows <= self.rows and tokens <= self.tokens:
            return False
        self._refuse_too_large(rows, tokens)
        self._lay_out(rows, tokens, prompt)
        self.rows, self.tokens = rows, tokens
        self._bytes = max(self._bytes, self.shape.bytes_for(rows, tokens))
        return True

    def start_over(self) -> None:
        """Forget all tokens: needed before prompts of a single one, which the kernels take for a continuation."""
        _deepspeed_workspace().reset_cache()

    def _refuse_too_large(self, rows: int, tokens: int) -> None:
        """DeepSpeed does not look whether its allocation succeeded."""
        needed = self.shape.bytes_for(rows, tokens)
        if self._device.type != "cuda" or needed <= self._bytes:
            return
        release_memory()
        free = torch.cuda.mem_get_info(self._device)[0] + self._bytes
        if needed + _SPARE_BYTES > free:
            raise torch.OutOfMemoryError(
                f"a workspace for {rows} rows of {tokens} tokens takes {needed >> 20} MiB, {free >> 20} MiB are free"
            )

    def _lay_out(self, rows: int, tokens: int, prompt: int) -> None:
        shape = self.shape
        quiet_rank = 1  # rank 0 prints a table at every call
        try:
            # As many tokens at least as at most: else it makes do with fewer where memory is short, and does not tell.
            _deepspeed_workspace().allocate_workspace(
                shape.width, shape.heads, prompt, rows, shape.layers, 1, False, quiet_rank, tokens, tokens
            )
        except RuntimeError as error:
            raise torch.OutOfMemoryError(
                f"DeepSpeed's workspace for {rows} rows of {tokens} tokens: {error}"
            ) from error


def _deepspeed_workspace() -> Any:
    from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference

    return DeepSpeedTransformerInference.workspace
