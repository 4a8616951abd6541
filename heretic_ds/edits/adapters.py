"""Edits as adapters: low-rank additions to the writers of a model whose own weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heretic_ds.ablation import Ablation, Edit, LowRank, low_rank_edit
from heretic_ds.anatomy import Anatomy, Writer

ReadWriter = Callable[[Writer], tuple[Tensor, Tensor | None]]
"""A writer's original weight, the stream at -2, and the gain of the norms behind it."""


@dataclass(frozen=True)
class AdaptedWriter:
    """What an adapter adds to one writer."""

    writer: Writer
    parts: tuple[LowRank, ...]
    """One, or one for each expert."""


@dataclass(frozen=True)
class Adapter:
    """An edit as low-rank additions."""

    writers: tuple[AdaptedWriter, ...]

    @property
    def rank(self) -> int:
        """The highest of any writer."""
        return max(part.rank for adapted in self.writers for part in adapted.parts)

    @property
    def bytes(self) -> int:
        """Of its numbers in float32."""
        parts = [part for adapted in self.writers for part in adapted.parts]
        return sum(part.out_DR.nbytes + part.in_RK.nbytes for part in parts)

    @property
    def exact(self) -> bool:
        """Whether nothing of the edit was left out."""
        return all(part.left_out == 0.0 for adapted in self.writers for part in adapted.parts)

    @property
    def error(self) -> float:
        """‖ΔW - BA‖ / ‖ΔW‖ over all writers together (Frobenius); 0 where the adapter is exact."""
        parts = [part for adapted in self.writers for part in adapted.parts]
        change = sum(part.change for part in parts)
        return math.sqrt(sum(part.left_out for part in parts) / change) if change > 0 else 0.0

    @property
    def largest_error(self) -> tuple[float, str]:
        """That of the one writer with the largest, or of an expert of it, and the writer's module."""
        errors = [
            (math.sqrt(part.left_out / part.change) if part.change > 0 else 0.0, adapted.writer.module)
            for adapted in self.writers
            for part in adapted.parts
        ]
        return max(errors, key=lambda error: error[0])


def make_adapter(anatomy: Anatomy, ablation: Ablation, edit: Edit, read: ReadWriter, rank: int) -> Adapter:
    """The adapter of an edit, from the original weights that ``read`` gives, one writer at a time; its factors are on
    the host. ``rank`` counts where the edit has none of its own: see :func:`heretic_ds.ablation.low_rank_edit`."""
    adapted = []
    for writer in anatomy.writers:
        strength = edit.strength(writer.component, writer.block)
        if strength == 0.0:
            continue
        weight_DK, gain_D = read(writer)
        direction_RD = ablation.writer_directions(writer.block, gain_D, edit.direction_index)
        matrices = weight_DK.unbind(0) if weight_DK.dim() == 3 else (weight_DK,)
        parts = (low_rank_edit(matrix, direction_RD, strength, ablation.row_norm, rank) for matrix in matrices)
        adapted.append(AdaptedWriter(writer, tuple(map(_on_host, parts))))
    return Adapter(tuple(adapted))


def _on_host(part: LowRank) -> LowRank:
    return LowRank(part.out_DR.float().cpu(), part.in_RK.float().cpu(), part.left_out, part.change)


@contextmanager
def worn(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """While open, the model, whose weights are the originals, computes with the adapter.

    As `peft` has it: a linear writer's output gets B(Ax), computed in float32; fused experts' weights get BA, in their
    own dtype, and come back bit for bit.
    """
    with ExitStack() as stack, torch.no_grad():
        for adapted in adapter.writers:
            if adapted.writer.experts is None:
                module = model.get_submodule(adapted.writer.module)
                handle = module.register_forward_hook(_adding(adapted.parts[0], next(module.parameters()).device))
                stack.callback(handle.remove)
            else:
                weight_EDK = adapted.writer.weight_DK(model)
                stack.callback(weight_EDK.copy_, weight_EDK.detach().to("cpu", copy=True))
                for matrix_DK, part in zip(weight_EDK.unbind(0), adapted.parts, strict=True):
                    added_DK = part.out_DR.to(matrix_DK) @ part.in_RK.to(matrix_DK)
                    matrix_DK.add_(added_DK)
        yield


def _adding(part: LowRank, device: torch.device) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    in_KR, out_RD = part.in_RK.T.to(device), part.out_DR.T.to(device)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        added = inputs[0].to(in_KR.dtype) @ in_KR @ out_RD
        return (output + added.to(torch.promote_types(output.dtype, added.dtype))).to(output.dtype)

    return hook
