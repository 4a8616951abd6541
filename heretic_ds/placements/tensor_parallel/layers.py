"""Layers of which each rank of a group holds a part, over plain tensors: shards can be edited where they lie.

Forward passes only: nothing here has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heretic_ds.checkpoint.shards import share
from heretic_ds.world import Replicas


class SplitByOutputs(nn.Linear):
    """A linear layer with some rows of the weight; its output is this rank's part, or all parts side by side."""

    def __init__(self, whole: nn.Linear, ranks: Replicas, gathered: bool) -> None:
        parts = [share(whole.out_features, member, ranks.degree) for member in range(ranks.degree)]
        sizes = [stop - start for start, stop in parts]
        super().__init__(whole.in_features, sizes[ranks.member], whole.bias is not None, "meta", whole.weight.dtype)
        self._group, self._sizes, self._gathered = ranks.inside, sizes, gathered

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return gather_last(output, self._sizes, self._group) if self._gathered else output


class SplitByInputs(nn.Linear):
    """A linear layer with some columns of the weight; outputs are summed over ranks, the bias is added after that."""

    def __init__(self, whole: nn.Linear, ranks: Replicas, whole_input: bool) -> None:
        start, stop = share(whole.in_features, ranks.member, ranks.degree)
        super().__init__(stop - start, whole.out_features, whole.bias is not None, "meta", whole.weight.dtype)
        self._group, self._whole = ranks.inside, whole.in_features
        self._part = (start, stop) if whole_input else None

    def forward(self, input: Tensor) -> Tensor:
        if self._part is not None:
            if input.shape[-1] != self._whole:  # a plan that has split what feeds this layer
                raise RuntimeError(f"an input of {input.shape[-1]} numbers is not the whole of {self._whole}")
            input = input[..., self._part[0] : self._part[1]]
        output = nn.functional.linear(input, self.weight).contiguous()
        dist.all_reduce(output, group=self._group)
        return output if self.bias is None else output + self.bias


def gather_last(part: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' parts [..., sizes[i]] side by side; shorter ones travel padded."""
    longest = max(sizes)
    padded = part if part.shape[-1] == longest else nn.functional.pad(part, (0, longest - part.shape[-1]))
    padded = padded.contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([each[..., :size] for each, size in zip(parts, sizes, strict=True)], dim=-1)


def split_vocabulary(embedding: nn.Embedding, ranks: Replicas) -> None:
    """Let an embedding whose weight will hold this rank's rows alone give zeros for other tokens, and sum over ranks.

    Hooks, not another class: what a family's embedding does beyond looking up rows (scaling) stays.
    """
    start, stop = share(len(embedding.weight), ranks.member, ranks.degree)
    absent: list[Tensor] = []

    def look_up(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        absent.append((ids < start) | (ids >= stop))
        return ((ids - start).clamp(0, stop - start - 1), *args[1:])

    def add_up(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.masked_fill(absent.pop().unsqueeze(-1), 0.0).contiguous()
        dist.all_reduce(output, group=ranks.inside)
        return output

    embedding.register_forward_pre_hook(look_up)
    embedding.register_forward_hook(add_up)
    embedding.padding_idx = None
