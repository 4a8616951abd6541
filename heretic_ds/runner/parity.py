"""Whether two ways to the same logits differ by more than rounding: a model in parts beside the whole one, steps over
slots beside those over the model's own cache.

The reference for a model in parts needs no rank that holds the whole of it: one block at a time gets its weights, runs,
and loses them.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint
from heretic_ds.checkpoint.fitness import dtype_name, first_line
from heretic_ds.errors import UserError
from heretic_ds.memory import return_freed_blocks
from heretic_ds.prompts import pad_left
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.forward import Forward
from heretic_ds.runner.rows import Row
from heretic_ds.runner.slots import Slots

log = logging.getLogger(__name__)

_LENGTHS = (11, 5, 8)
"""Tokens of each row: unlike, so that padding is part of the check."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION = 0.15
"""In 16 bits sums in another order differ by a few percent, more where a router's choice flips; what is wrong by
design differs by half and more."""
_LEAST, _TIMES_ROUNDING, _MOST = 1e-4, 4.0, 0.1
"""How far logits of one model on one machine may be off, as a part of their spread: at least, in multiples of rounding,
and at most. Logits that depend on what else is in the batch are no measure of rounding."""


def distance(found_BV: Tensor, expected_BV: Tensor) -> float:
    """How far logits are off, as a part of their spread."""
    expected_BV = expected_BV.double()
    spread = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm()
    return ((found_BV.double() - expected_BV).norm() / spread).item()


def is_rounding(error: float, rounding: float) -> bool:
    """Whether a distance is explained by another one, between logits that differ in rounding alone."""
    return error <= min(max(_LEAST, _TIMES_ROUNDING * rounding), _MOST)


def sample_rows(vocabulary: int, count: int = len(_LENGTHS)) -> list[list[int]]:
    """A few rows of tokens from all over the vocabulary, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    lengths = [_LENGTHS[row % len(_LENGTHS)] for row in range(count)]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def slot_distances(forward: Forward) -> tuple[float, float]:
    """How far the logits of one step over slots are from those over the model's own cache, and how far those are from
    the same with more padding, which is rounding alone.

    Three rows of unlike lengths, each with columns behind it that are not its own.
    """
    rows = [Row(prompt) for prompt in sample_rows(forward.model.config.get_text_config(decoder=True).vocab_size)]
    cache = forward.own_cache()
    begun = forward(rows, cache)
    token_B = begun.logits_BV.argmax(dim=-1)
    expected_BV = forward.step(begun, token_B, cache)
    cache = forward.own_cache()
    begun = forward([*rows, Row([*rows[0].prompt, *rows[1].prompt])], cache)
    padded_BV = forward.step(begun, torch.cat([token_B, token_B[:1]]), cache)[: len(rows)]
    slots, order = Slots(forward, len(rows) + 1, 2 * max(_LENGTHS)), [2, 0, 1]
    cache = forward.growing_cache()
    slots.join(forward(rows, cache), cache, token_B, order)
    found_BV = slots.logits(slots.rows, slots.columns)[order]
    return distance(found_BV, expected_BV), distance(padded_BV, expected_BV)


@torch.inference_mode()
def streamed_logits(
    model: PreTrainedModel, anatomy: Anatomy, checkpoint: Checkpoint, rows: list[list[int]], device: torch.device
) -> Tensor:
    """Logits [B, V] of the unsplit model after each row, float32, on the host.

    ``model`` is empty, with its parameters on the meta device, and is so again afterwards. Memory for one block at a
    time, or for one module outside the blocks.
    """
    for name in checkpoint.shapes:  # buffers are small, and stay
        path, _, attribute = name.rpartition(".")
        if attribute in model.get_submodule(path)._buffers:
            model.get_submodule(path)._buffers[attribute] = checkpoint.read(name, checkpoint.whole(name), device)
    for module in model.modules():
        for attribute, buffer in module._buffers.items():
            module._buffers[attribute] = None if buffer is None else buffer.to(device)
    batch = pad_left(rows, 0).to(device)
    with ExitStack() as stack:
        if device.type == "cpu":  # else the largest module comes on top of a block that is freed and kept
            return_freed_blocks(at_once=True)
            stack.callback(return_freed_blocks, at_once=False)
        for unit, parts in _units(model, anatomy):
            streamed = _Streamed(parts, checkpoint, device)
            if unit is model.get_input_embeddings():  # Llama 4 asks where its weight is before it calls it
                streamed.load(unit, ())
            else:
                stack.callback(unit.register_forward_pre_hook(streamed.load).remove)
            stack.callback(unit.register_forward_hook(streamed.drop).remove)
        forward = Forward(model, pad_id=0)
        logits_BV = forward.logits(batch.input_ids_BS, batch.attention_mask_BS, batch.position_ids_BS)
    return logits_BV.float().cpu()


def _units(model: nn.Module, anatomy: Anatomy) -> list[tuple[nn.Module, list[tuple[str, nn.Module]]]]:
    """Modules that get weights when they run, each with those modules, by path, whose weights these are."""
    blocks = model.get_submodule(anatomy.blocks)
    inside: set[int] = set()
    units = []
    for index, block in blocks.named_children():
        prefix = f"{anatomy.blocks}.{index}"
        parts = [(f"{prefix}.{path}" if path else prefix, module) for path, module in block.named_modules()]
        inside |= {id(module) for _, module in parts}
        units.append((block, parts))
    outside = [(path, module) for path, module in model.named_modules() if id(module) not in inside]
    return units + [(module, [(path, module)]) for path, module in outside if module._parameters]


class _Streamed:
    """Modules that have weights only while one of them runs."""

    def __init__(self, parts: list[tuple[str, nn.Module]], checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        self._empty = [
            (module, attribute, parameter, f"{path}.{attribute}" if path else attribute)
            for path, module in parts
            for attribute, parameter in module.named_parameters(recurse=False)
        ]

    def load(self, module: nn.Module, args: Any) -> None:
        """Read the weights."""
        for owner, attribute, _, name in self._empty:
            weight = self._checkpoint.read(name, self._checkpoint.whole(name), self._device)
            owner._parameters[attribute] = nn.Parameter(weight, requires_grad=False)

    def drop(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget them."""
        for owner, attribute, empty, _ in self._empty:
            owner._parameters[attribute] = empty


def check_split_model(
    comm: Comm,
    model: PreTrainedModel,
    reference: Callable[[list[list[int]]], Tensor],
    what: str,
    otherwise: str,
    turn: int = 0,
    turns: int = 1,
) -> None:
    """Compare with the unsplit model, whose logits [B, V] after some rows rank 0 finds by ``reference``.

    All ranks call it; ``what`` names the choice that split the model, ``otherwise`` says what to choose instead. Where
    each rank of a replica has rows of its own, this one's are in the ``turn``-th of as many orders as there are
    ``turns``: what comes back to another rank's row is noticed. Raises UserError where the logits are another model's.
    """
    count = max(len(_LENGTHS), turns)
    rows = sample_rows(model.config.get_text_config(decoder=True).vocab_size, count)
    reference_BV = comm.world.decide(lambda: reference(rows), "running the unsplit model")
    order = [(turn + row) % len(rows) for row in range(len(rows))]

    def logits() -> Tensor:
        return Forward(model, pad_id=0)([Row(rows[row]) for row in order]).logits_BV

    logits_BV = comm.agree(lambda: tried(logits, model, what, otherwise))
    comm.world.agree(lambda: check(logits_BV, reference_BV[order], model.dtype, what, otherwise))


@torch.inference_mode()
def tried(logits: Callable[[], Tensor], model: PreTrainedModel, what: str, otherwise: str) -> Tensor:
    """The logits [B, V] that first passes of a split model give, in float32 on the host. Raises UserError where they
    cannot be run."""
    try:
        return logits().float().cpu()
    except RuntimeError as error:  # shapes that do not fit, or no memory
        raise UserError(
            f"{what} cannot run this {model.config.model_type} model ({first_line(error)}); {otherwise}"
        ) from error


def check(logits_BV: Tensor, reference_BV: Tensor, dtype: torch.dtype, what: str, otherwise: str) -> None:
    """Compare a split model's logits with the unsplit model's; :func:`check_split_model`'s arguments and errors."""
    reference_BV = reference_BV.double()
    if reference_BV.isnan().any() or (reference_BV == math.inf).any():
        raise UserError(
            f"the unsplit model gives logits that are not finite in {dtype_name(dtype)}; set another model.dtype "
            "(float32 is the safest)"
        )
    error = distance(logits_BV.cpu(), reference_BV)
    if not error <= _TOLERANCES.get(dtype, _LOW_PRECISION):
        raise UserError(
            f"{what} gives other logits than the unsplit model (off by {error:.2g} of their spread): it does not "
            f"serve this model; {otherwise}"
        )
    log.info("%s gives the logits of the unsplit model (off by %.1e of their spread)", what, error)
