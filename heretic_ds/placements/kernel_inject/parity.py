"""The check that a model with injected kernels computes what it computed before.

Shapes: B rows, S positions, N steps, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from heretic_ds.errors import UserError
from heretic_ds.placements.kernel_inject.adapter import Adapter
from heretic_ds.prompts import pad_left
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.parity import distance

log = logging.getLogger(__name__)

_LENGTHS = ((6,), (9, 4, 6, 1))
"""Tokens of the rows of each batch: one without padding, then a larger one with it, so that the workspace grows."""
_STEPS = 5
"""Tokens that are decoded after the prompts."""
_KEPT = (3, 0, 2)
"""Rows of a batch of four that go on after half of the steps: as when finished rows leave."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
_LOW_PRECISION = 0.15
"""In 16 bits right results differ by a few percent, wrong ones by half and more. In float32 the kernels ask cuBLAS for
tensor cores, which may round the factors of a product."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest error of logits, as a part of their spread, that rounding explains."""
    return _TOLERANCES.get(dtype, _LOW_PRECISION)


@dataclass(frozen=True)
class Sample:
    """What the model computes, before its kernels are injected, for prompts and their greedy answers."""

    logits: list[Tensor]
    """For each batch, [B, V] of every step, one below the other: float32, on the host."""
    answers: list[list[Tensor]]
    """For each batch the tokens [B] that each step was given."""


@torch.inference_mode()
def sample(model: PreTrainedModel) -> Sample:
    """Logits of a few prompts and of their greedy continuations, by the model as it is."""
    runs = [_run(model, lengths, None) for lengths in _LENGTHS]
    return Sample([logits for logits, _ in runs], [tokens for _, tokens in runs])


@torch.inference_mode()
def error_of(model: PreTrainedModel, decoding: Callable[[int], AbstractContextManager[Any]], expected: Sample) -> float:
    """How far the logits of ``model`` are from the sample's for the same tokens, as a part of the logits' spread;
    ``decoding`` is what a runner decodes in (:class:`heretic_ds.runner.traits.Traits`)."""
    worst = 0.0
    with decoding(_STEPS):
        for lengths, logits, tokens in zip(_LENGTHS, expected.logits, expected.answers, strict=True):
            found, _ = _run(model, lengths, tokens)
            error = distance(found, logits)
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def check(model: PreTrainedModel, adapter: Adapter, expected: Sample) -> None:
    """Raise UserError where the injected model's logits are not those of the model before."""
    error = error_of(model, adapter.expecting, expected)
    if error > tolerance(model.dtype):
        raise UserError(
            f"evaluate=kernel_inject gives other logits than the model itself (off by {error:.2g} of their spread); "
            "set evaluate=tensor_parallel"
        )
    log.info("the injected kernels give the model's own logits (off by %.1e of their spread)", error)


def _run(model: PreTrainedModel, lengths: tuple[int, ...], given: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Logits of every step, and the token that each step but the first was given: greedy ones where none are given."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config(decoder=True)
    rows = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    batch, forward = pad_left(rows, 0).to(model.device), Forward(model, pad_id=0)
    mask_BS, position_B1 = batch.attention_mask_BS, batch.position_ids_BS[:, -1:]
    cache = DynamicCache(config=config)
    logits = [forward.logits(batch.input_ids_BS, mask_BS, batch.position_ids_BS, cache)]
    tokens: list[Tensor] = []
    for step in range(_STEPS):
        token_B = given[step].to(model.device) if given is not None else logits[-1].argmax(-1)
        if len(rows) > len(_KEPT) and step == _STEPS // 2:
            keep = torch.tensor(_KEPT, device=model.device)
            cache.reorder_cache(keep)  # type: ignore[arg-type]  # a name for int64 tensors
            mask_BS, position_B1 = mask_BS[keep], position_B1[keep]
            token_B = token_B if given is not None else token_B[keep]
        tokens.append(token_B.cpu())
        mask_BS, position_B1 = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], 1), position_B1 + 1
        logits.append(forward.logits(token_B[:, None], mask_BS, position_B1, cache))
    return torch.cat([part.float().cpu() for part in logits]), tokens
