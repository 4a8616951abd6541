"""Which part of a parameter lies on this rank, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that lies on this rank: ranges along one dimension, or all of it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int = 0
    ranges: tuple[tuple[int, int], ...] | None = None
    """Parts [start, stop) along `dim`, in the order in which they lie in memory; None for all of it."""
    zeroed: bool = False
    """Whether this rank holds zeros, because another one's copy is added to this one's in a sum."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part on this rank."""
        if self.ranges is None:
            return self.shape
        size = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter."""
        if self.zeroed:
            return torch.zeros_like(whole)
        if self.ranges is None:
            return whole
        return torch.cat([whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges], dim=self.dim)


def share(size: int, member: int, degree: int) -> tuple[int, int]:
    """The part [start, stop) of `size` items that is `member`'s of `degree`, as even as can be."""
    least, larger = divmod(size, degree)
    start = member * least + min(member, larger)
    return start, start + least + (member < larger)


def split(shape: Sequence[int], dim: int, member: int, degree: int, packed: int = 1, grain: int = 1) -> Shard:
    """`member`'s part of a parameter that is split along `dim` over `degree` ranks.

    `packed` parts lie side by side along `dim` (a gate and an up projection) and are split each. `grain` neighbours
    stay together (a gate's row and an up projection's that alternate).
    """
    dim = dim % len(shape)
    part = shape[dim] // packed
    start, stop = (grain * bound for bound in share(part // grain, member, degree))
    ranges = tuple((i * part + start, i * part + stop) for i in range(packed))
    return Shard(tuple(shape), dim, ranges)
