"""Token rows as left-padded batches. Shapes: B rows of a batch, S positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from heretic_ds.errors import UserError
from heretic_ds.scoring.base import TokenRows


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind and part, as text and as the token ids that are put to the model."""

    texts: Sequence[str]
    rows: TokenRows
    continuations: TokenRows | None = None
    """What follows each, of texts that are not asked but read as they are."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the left, so that every row ends at the last position; all tensors are int64 [B, S]."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    """1 at tokens, 0 at padding."""
    position_ids_BS: Tensor
    """Positions counted from each row's first token; 0 at padding."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.input_ids_BS.to(device), self.attention_mask_BS.to(device), self.position_ids_BS.to(device))


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """A batch of rows of token ids, padded with ``pad_id`` to the length of the longest.

    Positions are passed to the model explicitly, since padding would shift learned ones otherwise.
    """
    longest = max(len(row) for row in rows)
    input_ids_BS = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], dtype=torch.int64)
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    position_S = torch.arange(longest)
    mask_BS = (position_S >= longest - lengths_B1).long()
    return Batch(input_ids_BS, mask_BS, (mask_BS.cumsum(dim=1) - 1).clamp(min=0))


def check_lengths(
    rows: Sequence[Sequence[int]], max_new_tokens: int | None, config: PreTrainedConfig, name: str
) -> None:
    """Raises UserError where the longest row and its answer do not fit into the model's context.

    ``max_new_tokens`` None: the answer is as long as there is room, but there has to be some. ``name`` is the override
    prefix of the prompts.
    """
    room = room_for_answers(rows, config)
    if room is None or room >= (max_new_tokens or 1):
        return
    index, longest = max(enumerate(map(len, rows)), key=lambda item: item[1])
    context = longest + room
    if max_new_tokens is None:
        raise UserError(
            f"{name}: prompt {index} has {longest} tokens, which leave no room for an answer in the model's context of "
            f"{context}; leave long prompts out of {name}.source"
        )
    raise UserError(
        f"{name}: prompt {index} has {longest} tokens, which with "
        f"generation.max_new_tokens={max_new_tokens} exceeds the model's context of {context}; "
        f"leave long prompts out of {name}.source, or lower generation.max_new_tokens"
    )


def room_for_answers(rows: Sequence[Sequence[int]], config: PreTrainedConfig) -> int | None:
    """Tokens that are left of the model's context behind the longest row.

    None for models without a limit, see :func:`context_of`: they take rows of any length.
    """
    context = context_of(config)
    return None if context is None else context - max(map(len, rows))


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model takes at most; None where its configuration gives no number, or its attention has no
    positions to run out of (ALiBi)."""
    text_config = config.get_text_config(decoder=True)
    context = getattr(text_config, "max_position_embeddings", None)
    known = isinstance(context, int) and context > 0 and not getattr(text_config, "alibi", False)
    return context if known else None
