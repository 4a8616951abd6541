"""Greedy decoding of one batch: as few steps, rows and tokens as the answers need.

Works over the model's own cache classes, so that every attention kind (full, sliding, linear, convolution) decodes.
Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.engines.protocol import Decided, TokenRows
from heretic_ds.prompts import pad_left

_DECIDE_EVERY = 4
"""Tokens between two questions to the scorers: turning tokens into text costs about as much as a small model's step."""

_COMPACT_BELOW = 0.75
"""Share of live rows in a batch below which the others' rows leave it."""


class Forward:
    """The model's forward pass reduced to what decoding needs: last-position logits, with the arguments it takes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._optional = {name for name in ("position_ids", "logits_to_keep") if takes_anything or name in parameters}

    def __call__(self, input_ids_BS: Tensor, mask_BS: Tensor, position_ids_BS: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, V] of the last position."""
        if "position_ids" in self._optional:
            kwargs["position_ids"] = position_ids_BS
        if "logits_to_keep" in self._optional:
            kwargs["logits_to_keep"] = 1
        logits: Tensor = self._model(input_ids=input_ids_BS, attention_mask=mask_BS, **kwargs).logits
        return logits[:, -1]


def _live_rows(
    live: list[int],
    answers: list[list[int]],
    tokens: list[int],
    ends: Collection[int],
    limit: int,
    decided: Decided | None,
) -> list[int]:
    """Positions within the batch of the rows that go on, after each row's new token was noted in its answer."""
    going = []
    for position, (row, token) in enumerate(zip(live, tokens, strict=True)):
        if row < 0 or token in ends:
            continue
        answers[row].append(token)
        if len(answers[row]) < limit:
            going.append(position)
    length = max((len(answers[live[position]]) for position in going), default=0)
    if decided is not None and going and length % _DECIDE_EVERY == 0:
        verdicts = decided([answers[live[position]] for position in going])
        going = [position for position, verdict in zip(going, verdicts, strict=True) if not verdict]
    return going


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: TokenRows,
    pad_id: int,
    ends: Collection[int],
    max_new_tokens: int,
    decided: Decided | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Greedy answers to one batch of prompts, without their end token.

    A row stops at an end token, after ``max_new_tokens``, or as soon as ``decided`` says that its scores can no longer
    change. Stopped rows leave the batch once they are a quarter of it. Where ranks decode in step, ``anyone`` tells
    whether any of them has a row that goes on; until none has, a rank without one keeps the first row of its batch.
    """
    forward = Forward(model)
    device = next(model.parameters()).device
    batch = pad_left(prompts, pad_id).to(device)
    mask_BS, position_B1 = batch.attention_mask_BS, batch.position_ids_BS[:, -1:]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    logits_BV = forward(batch.input_ids_BS, mask_BS, batch.position_ids_BS, past_key_values=cache, use_cache=True)
    answers: list[list[int]] = [[] for _ in prompts]
    live: list[int] = list(range(len(prompts)))  # the prompt in each row of the batch; -1 where it has stopped
    while True:
        token_B = logits_BV.argmax(dim=-1)
        going = _live_rows(live, answers, token_B.tolist(), ends, max_new_tokens, decided)
        if not anyone(bool(going)):
            return answers
        if max(len(going), 1) <= _COMPACT_BELOW * len(live):
            keep = torch.tensor(going or [0], device=device)
            cache.reorder_cache(keep)  # type: ignore[arg-type]  # a name for int64 tensors
            token_B, mask_BS, position_B1 = token_B[keep], mask_BS[keep], position_B1[keep]
            live = [live[position] for position in going] or [-1]
        else:
            staying = set(going)
            live = [row if position in staying else -1 for position, row in enumerate(live)]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(live), 1)], dim=1)
        position_B1 = position_B1 + 1
        logits_BV = forward(token_B[:, None], mask_BS, position_B1, past_key_values=cache, use_cache=True)


def last_logits(model: PreTrainedModel, prompts: TokenRows, pad_id: int) -> Tensor:
    """Logits [B, V] of the first answer token of each prompt."""
    batch = pad_left(prompts, pad_id).to(next(model.parameters()).device)
    return Forward(model)(batch.input_ids_BS, batch.attention_mask_BS, batch.position_ids_BS, use_cache=False)


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Every token id that ends an answer, by the model's generation config and by its tokenizer."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids: Sequence[int | None] = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
