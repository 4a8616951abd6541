"""Weights that bitsandbytes holds in few bits: which modules have such, and the matrices that they stand for.

Such a module is a ``Linear4bit`` or a ``Linear8bitLt``, whatever stood in its place before, and so lies output first.

Shapes: D outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from heretic_ds.errors import UserError

_FOUR_BITS, _EIGHT_BITS = "Params4bit", "Int8Params"
"""Classes of bitsandbytes' parameters, by name: the library is imported where it has packed something."""


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weight is held in few bits."""
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == _FOUR_BITS:
        return getattr(weight, "quant_state", None) is not None
    return type(weight).__name__ == _EIGHT_BITS and isinstance(weight, Tensor) and weight.dtype == torch.int8


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those of a model, with their paths."""
    return ((path, module) for path, module in model.named_modules() if is_packed(module))


def unpacked(module: Any) -> Tensor:
    """The matrix [D, K] that a packed module multiplies by, in memory of its own: of 4 bits in the dtype that it had
    before, of 8 bits in float32."""
    from bitsandbytes import functional

    weight = module.weight
    if type(weight).__name__ == _EIGHT_BITS:
        scales_D = module.state.SCB if weight.SCB is None else weight.SCB  # they move with the first forward
        return functional.int8_vectorwise_dequant(weight.data, scales_D)
    if getattr(weight.quant_state, "packing_format_for_cpu", False):  # as a first forward on some CPUs leaves it
        return four_bits_unpacked(
            *functional._convert_weight_packed_for_cpu_inverse(weight.data, copy(weight.quant_state))
        )
    return four_bits_unpacked(weight.data, weight.quant_state)


def four_bits_unpacked(codes: Tensor, state: Any) -> Tensor:
    """The matrix [D, K] that codes of 4 bits stand for; ``state`` is what bitsandbytes keeps beside them.

    Where its blocks do not end with rows, bitsandbytes (0.50.2) takes wrong scales on a CPU; there it is done here.
    """
    from bitsandbytes import functional

    _check_state(codes, state)
    if codes.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return functional.dequantize_4bit(codes, state)
    scales_B = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    pairs = codes.contiguous().view(torch.uint8).flatten()
    places = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten()[: math.prod(state.shape)].int()
    scales = scales_B.float().repeat_interleave(state.blocksize)[: len(places)]
    return (state.code.float()[places] * scales).view(state.shape).to(state.dtype)


def _check_state(codes: Tensor, state: Any) -> None:
    """Refuse what lies beside codes of 4 bits where it does not fit them: kernels read memory by it. UserError."""
    numbers = math.prod(state.shape)
    blocks = [(state.absmax, -(-numbers // max(state.blocksize, 1)))]
    fits = (
        state.blocksize > 0 and codes.nbytes == -(-numbers // 2) and len(state.shape) == 2 and state.code.numel() == 16
    )
    if state.nested:
        blocks.append((state.state2.absmax, -(-blocks[0][1] // max(state.state2.blocksize, 1))))
        fits = fits and state.state2.blocksize > 0 and state.state2.code.numel() == 256
    if not fits or any(scales.numel() != count for scales, count in blocks):
        raise UserError(
            f"a matrix of shape {list(state.shape)} in 4 bits has {codes.nbytes} bytes of codes and "
            f"{state.absmax.numel()} scales, which do not fit; download or copy the model again"
        )


def scales(module: Any) -> Tensor:
    """Numbers of a packed module that are finite where those it was packed from were."""
    weight = module.weight
    if type(weight).__name__ == _EIGHT_BITS:
        found: Tensor = module.state.SCB if weight.SCB is None else weight.SCB
        return found
    state = weight.quant_state
    _check_state(weight.data, state)
    return state.offset if state.nested else state.absmax
