"""A stand-in for DeepSpeed's compiled inference kernels, so that its injected blocks run without a GPU.

It follows ``pt_binding.cpp``, ``inference_context.h`` and the kernels they start function by function, with what makes
them hard to live with: one flat workspace at whose offsets everything is laid out, for as many rows and tokens as it
was allocated for; activations that reach into keys and values where they are too many; a residual that is updated in
place, and behind its end too; masks that are read as raw memory; tokens counted by the kernels alone. Only reads and
writes beyond the end of the workspace or of a stream's memory, which the kernels carry out, are errors here, and the
workspace starts out as NaN.

Shapes: B rows, S positions of the pass, T positions so far, D width, H heads, K head size, G heads of keys and values.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GELU, _RELU, _GATED_GELU, _GATED_SILU = 1, 2, 3, 4
_MEGABYTE, _GIGABYTE = 1 << 20, 1 << 30


class InferenceOp:
    """The module that ``InferenceBuilder().load()`` would give."""

    def __init__(self, free_bytes: int = 8 * _GIGABYTE, pairs_as_in_half: bool = False) -> None:
        """``free_bytes`` is the device memory that the kernels find free. The kernel that rotates pairs is wrong in
        float32; ``pairs_as_in_half`` gives what the one for 16 bits computes, at full precision."""
        self.free_bytes = free_bytes
        self.pairs_as_in_half = pairs_as_in_half
        self.allocations: list[tuple[int, int]] = []
        self._space: Tensor | None = None
        self._tokens = 1
        self._batch = self._longest = 0
        self._scores_at = 0

    def __getattr__(self, name: str) -> Any:
        """``qkv_gemm_fp32`` and its like: one method for all types."""
        match = re.fullmatch(r"(\w+)_(fp32|fp16|bf16)", name)
        method = match and getattr(type(self), f"op_{match[1]}", None)
        if not match or method is None:
            raise AttributeError(name)
        return lambda *arguments: method(self, _TYPES[match[2]], *arguments)

    # -- the workspace ------------------------------------------------------------------------------------------------

    def op_allocate_workspace(
        self, dtype: torch.dtype, width: int, heads: int, prompt: int, batch: int, layers: int, mp_size: int,
        external: bool, rank: int, max_tokens: int, min_tokens: int,
    ) -> None:  # fmt: skip
        head = width // heads
        padded = 32 if head <= 32 else 64 if head <= 64 else max(head, 128)
        activation, temporary = 10 * heads * padded * batch, batch * heads * max_tokens
        cache = layers * batch * heads * padded * 2
        least = temporary + (500 if self.free_bytes > _GIGABYTE else 100) * _MEGABYTE
        if self.free_bytes < least:
            raise RuntimeError("Workspace can't be allocated, no enough memory.")
        each = activation + temporary + cache
        self._longest = min(max_tokens, (self.free_bytes - least) // dtype.itemsize // each)
        if self._longest < min_tokens:
            raise RuntimeError("Workspace can't be allocated, not enough memory")
        self._batch = batch
        self._space = torch.full((each * self._longest,), float("nan"), dtype=dtype)
        self._scores_at = (each - temporary) * self._longest
        self.allocations.append((batch, self._longest))

    def reset_cache(self) -> None:
        self._tokens = 1

    def release_workspace(self) -> None:
        self._space = None

    def retake_workspace(self) -> bool:
        return True

    def _at(self, offset: int, *shape: int) -> Tensor:
        """The memory of the workspace from an offset on, as a tensor."""
        assert self._space is not None, "no workspace"
        size = torch.Size(shape).numel()
        if offset + size > self._space.numel():
            raise IndexError(f"{shape} at {offset} reach beyond a workspace of {self._space.numel()}")
        return self._space[offset : offset + size].view(shape)

    def _put(self, offset: int, value: Tensor) -> Tensor:
        return self._at(offset, *value.shape).copy_(value)

    # -- norms and products -------------------------------------------------------------------------------------------

    def op_qkv_gemm(
        self, dtype: torch.dtype, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor,
        epsilon: float, add_bias: bool, int8: bool, transposed: bool,
    ) -> list[Tensor]:  # fmt: skip
        norm = self._put(3 * x.numel(), F.layer_norm(x, x.shape[-1:], gamma, beta, epsilon))
        return [self._put(0, norm @ weight + (bias if add_bias else 0)), norm]

    def op_rms_qkv_gemm(
        self, dtype: torch.dtype, x: Tensor, weight: Tensor, scale: Tensor, gamma: Tensor, epsilon: float, int8: bool,
        transposed: bool,
    ) -> list[Tensor]:  # fmt: skip
        norm = self._put(3 * x.numel(), _rms_norm(x, gamma, epsilon))
        return [self._put(0, norm @ weight), norm]

    def op_vector_matmul(
        self, dtype: torch.dtype, x: Tensor, weight: Tensor, asynchronous: bool, scale: Tensor, int8: bool,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        return self._put(0, x @ weight)

    def op_mlp_gemm(
        self, dtype: torch.dtype, x: Tensor, residual: Tensor, input_bias: Tensor, weight: Tensor, weight_out: Tensor,
        bias: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, pre_norm: bool, after_attention: bool,
        scale: Tensor, scale_out: Tensor, int8: bool, activation: int, transposed: bool,
    ) -> list[Tensor]:  # fmt: skip
        size = x.numel()
        stream = x + residual + input_bias if after_attention else residual
        norm = self._put(2 * size, F.layer_norm(stream, x.shape[-1:], gamma, beta, epsilon))
        inner = norm @ weight
        inner = self._put(3 * size, inner)
        inner.copy_({_GELU: _gelu, _RELU: F.relu}[activation](inner + bias))
        return [self._put(size, inner @ weight_out), norm]

    def op_rms_mlp_gemm(
        self, dtype: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor, weight_out: Tensor, gamma: Tensor,
        epsilon: float, scale: Tensor, scale_out: Tensor, int8: bool, activation: int, transposed: bool,
    ) -> list[Tensor]:  # fmt: skip
        size = x.numel()
        self._add_rows(residual, x)
        norm = self._put(2 * size, _rms_norm(residual, gamma, epsilon))
        inner = self._put(3 * size, norm @ weight)
        up, gate = inner.chunk(2, dim=-1)
        up.copy_(up * {_GATED_GELU: F.gelu, _GATED_SILU: F.silu}[activation](gate))
        return [self._put(size, up @ weight_out), residual]

    def _add_rows(self, residual: Tensor, x: Tensor) -> None:
        """As ``rms_norm.cu`` adds: up to 128 wide in blocks of several rows, those of the last that are none too."""
        width = x.shape[-1]
        rows, group = x.numel() // width, 1 << (math.ceil(width * x.element_size() / 16) - 1).bit_length()
        block = min(rows, 256 // group) if width <= 128 else 1
        added = math.ceil(rows / block) * block * width
        if residual.storage_offset() + added > residual.untyped_storage().nbytes() // residual.element_size():
            raise IndexError(f"{added} numbers added to a stream of {rows * width} reach beyond its memory")
        behind = residual.as_strided((added,), (1,), residual.storage_offset())
        residual.add_(x)
        behind[rows * width :] += 1.0

    def op_fused_gemm_gelu(
        self, dtype: torch.dtype, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, weight_out: Tensor,
        scale_out: Tensor, int8: bool, transposed: bool,
    ) -> Tensor:  # fmt: skip
        return _gelu(x @ weight + bias) @ weight_out

    def op_linear_layer(self, dtype: torch.dtype, *arguments: Any) -> Tensor:
        raise NotImplementedError("blocks with a norm behind each part are not served")

    # -- sums ---------------------------------------------------------------------------------------------------------

    def op_residual_add_bias(
        self, dtype: torch.dtype, hidden: Tensor, residual: Tensor, attention: Tensor, attention_bias: Tensor,
        final_bias: Tensor, mp_size: int, after_attention: bool, add_bias: bool, pre_norm: bool,
    ) -> Tensor:  # fmt: skip
        total = residual + hidden + final_bias
        if not after_attention or pre_norm:
            total = total + attention
        if add_bias if not after_attention else pre_norm:
            total = total + attention_bias
        return residual.copy_(total)

    def _vector_add(self, a: Tensor, b: Tensor, gamma: float) -> Tensor:
        return a.copy_(gamma * a + b)

    # -- attention ----------------------------------------------------------------------------------------------------

    def op_softmax_context(
        self, dtype: torch.dtype, qkv: Tensor, mask: Tensor, rotary: int, halves: bool, pairs: bool, heads: int,
        kv_heads: int, norm_factor: float, triangular: bool, local: bool, window: int, no_masking: bool, layer: int,
        layers: int, alibi: Tensor, theta: float, is_prompt: bool, token_index: Any, position_ids: Any,
    ) -> list[Tensor]:  # fmt: skip
        rows, length, wide = qkv.shape
        groups = kv_heads if kv_heads > 0 else heads
        head = wide // (heads + 2 * groups)
        if length > 1:
            self._tokens = length
        seen = self._tokens
        begin = 0 if length > 1 else seen - 1
        size, width = rows * length * heads * head, heads * head
        key, value = (
            self._at(offset, self._batch, heads, self._longest, head)[:rows] for offset in self._caches(width, layer)
        )
        query, new_key, new_value = self._split(qkv.clone(), heads, groups, head)
        if rotary > 0 and pairs:
            query, new_key = (self._turn_pairs(x, rotary, begin, theta) for x in (query, new_key))
        if rotary > 0 and halves:
            query, new_key = (_turn_halves(x, rotary, begin, theta) for x in (query, new_key))
        query = self._put(5 * size, query)
        self._write(key, new_key, begin), self._write(value, new_value, begin)
        scores = norm_factor**2 * query.float() @ self._read(key, seen).float().transpose(-1, -2)
        shown = _shown(length, seen, triangular and length > 1, local, window)
        weights = _softmax(scores + _memory_of(mask, rows, seen, dtype), shown)
        weights = self._put(self._scores_at, weights.to(dtype))
        mixed = self._put(5 * size, weights @ self._read(value, seen))
        output = self._put(4 * size, mixed.transpose(1, 2).reshape(rows, length, width))
        if layer == layers - 1:
            self._tokens += 1
        return [output, key[:, :, :seen], value[:, :, :seen]]

    def _caches(self, width: int, layer: int) -> tuple[int, int]:
        """Offsets of a layer's keys and values, which begin behind the room for activations."""
        each = self._batch * self._longest * width
        return (10 + 2 * layer) * each, (11 + 2 * layer) * each

    def _write(self, cache: Tensor, new: Tensor, begin: int) -> None:
        if begin + new.shape[2] > self._longest or new.shape[0] > self._batch:
            raise IndexError(f"rows or tokens beyond {self._batch} x {self._longest}: {tuple(new.shape)} at {begin}")
        cache[:, :, begin : begin + new.shape[2]] = new

    def _read(self, cache: Tensor, seen: int) -> Tensor:
        return cache[:, :, :seen]

    def _split(self, qkv: Tensor, heads: int, groups: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, S, K]; those of a group are copied to each of its heads."""
        rows, length, _ = qkv.shape
        parts = qkv.split([heads * head, groups * head, groups * head], dim=-1)
        query, key, value = (part.reshape(rows, length, -1, head).transpose(1, 2) for part in parts)
        each = heads // groups
        return query, key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)

    def _turn_pairs(self, x: Tensor, rotary: int, begin: int, theta: float) -> Tensor:
        turned, angle = x.clone(), _angles(x.shape[2], rotary, begin, theta)
        first, second = x[..., :rotary:2], x[..., 1:rotary:2]
        turned[..., :rotary:2] = first * angle.cos() - second * angle.sin()
        kept = first if self.pairs_as_in_half or x.dtype != torch.float32 else turned[..., :rotary:2]
        turned[..., 1:rotary:2] = kept * angle.sin() + second * angle.cos()
        return turned


def _angles(length: int, rotary: int, begin: int, theta: float) -> Tensor:
    frequency = theta ** -(torch.arange(0, rotary, 2).float() / rotary)
    return torch.arange(begin, begin + length).float()[:, None] * frequency


def _turn_halves(x: Tensor, rotary: int, begin: int, theta: float) -> Tensor:
    angle = _angles(x.shape[2], rotary, begin, theta).repeat(1, 2)
    first, second = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    turned = x.clone()
    turned[..., :rotary] = x[..., :rotary] * angle.cos() + torch.cat([-second, first], -1) * angle.sin()
    return turned


def _shown(length: int, seen: int, triangular: bool, local: bool, window: int) -> Tensor:
    """Which positions [S, T] a query attends to; while decoding, a window is one position short."""
    query, key = torch.arange(length)[:, None], torch.arange(seen)[None, :]
    shown = torch.ones(length, seen, dtype=torch.bool)
    if triangular:
        shown &= key <= query
    if local:
        place = query + (0 if length == seen else seen)
        shown &= key > torch.where(place >= window, place - window, torch.tensor(-1))
    return shown


def _memory_of(mask: Tensor, rows: int, seen: int, dtype: torch.dtype) -> Tensor:
    """What the kernels read of a mask [B, T]: T numbers of their own type for each row, wherever they find them."""
    if mask.dim() < 2:
        return torch.zeros(())
    if mask.dim() > 2 or mask.dtype != dtype:
        raise TypeError(f"a mask {tuple(mask.shape)} of {mask.dtype} would be read as [B, T] of {dtype}")
    flat = mask.contiguous().reshape(-1)
    if flat.numel() < rows * seen:
        raise IndexError(f"a mask {tuple(mask.shape)} for {rows} rows of {seen} tokens")
    return flat[: rows * seen].view(rows, 1, 1, seen).float()


def _softmax(scores: Tensor, shown: Tensor) -> Tensor:
    scores = scores.masked_fill(~shown, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    scale = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt().to(x.dtype)
    return x * scale * gamma
