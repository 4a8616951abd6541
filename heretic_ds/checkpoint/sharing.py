"""Ranks of one machine that load the whole model together: each reads a part of the files and is sent the rest.

First every rank gives the model memory and reads its own rows into it: there a rank may fail without leaving others
waiting. Then the ranks exchange rows, tensor by tensor, on the device and in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from heretic_ds.checkpoint.conversions import Assembled
from heretic_ds.checkpoint.fill import Checkpoint, fill
from heretic_ds.checkpoint.open import OpenedModel
from heretic_ds.checkpoint.shards import Shard

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By its name since PyTorch 2.13, or the one before."""
_SMALL_BYTES = 64 * 2**10
"""Tensors below this size are read by every rank: an exchange costs more than reading that much."""


@dataclass
class PartlyRead(Checkpoint):
    """A checkpoint of whose tensors this rank reads its part only; the rest of their memory waits for the others'."""

    member: int = 0
    """This rank's place among those that read together."""
    degree: int = 1
    """Their number."""
    split: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors of which each rank has read so many rows, by its place; what is left at the end is lent, or small."""
    lent: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors, or last rows of some, that one rank alone has read, each with that rank's place."""

    def read_into(self, name: str, shard: Shard, part: Tensor) -> None:
        """Read this rank's rows of a tensor that will be whole on every rank."""
        rows = part.shape[0] // self.degree if part.dim() else 0
        if not isinstance(self.sources[name], Assembled):
            rows = 0  # it is made of whole tensors, so by one rank
        if rows and part.nbytes >= _SMALL_BYTES:
            self.split.append((part, rows))
            self._read_rows(name, shard, part, self.member * rows, rows)
            rest = self.degree * rows
        else:
            rest = 0
        left = part[rest:] if rest else part
        if left.nbytes < _SMALL_BYTES or self._lend(left) == self.member:
            if rest:
                self._read_rows(name, shard, part, rest, part.shape[0] - rest)
            else:
                super().read_into(name, shard, part)

    def _read_rows(self, name: str, shard: Shard, part: Tensor, start: int, count: int) -> None:
        if count:
            super().read_into(name, Shard(shard.shape, 0, ((start, start + count),)), part[start : start + count])

    def _lend(self, tensor: Tensor) -> int:
        """The place of the rank that reads a tensor for all: the one with the fewest such bytes so far."""
        read = [sum(lent.nbytes for lent, owner in self.lent if owner == place) for place in range(self.degree)]
        owner = read.index(min(read))
        self.lent.append((tensor, owner))
        return owner

    def exchange(self, group: dist.ProcessGroup | None) -> None:
        """Complete all tensors. ``group`` are the ranks that read together, in the order of their places; each has read
        its part."""
        for whole, rows in self.split if group is not None else []:
            own = whole[self.member * rows : (self.member + 1) * rows]
            _gather(_as_bytes(whole[: self.degree * rows]), _as_bytes(own), group=group)
        for whole, owner in self.lent if group is not None else []:
            dist.broadcast(_as_bytes(whole), group=group, group_src=owner)
        self.split.clear()
        self.lent.clear()


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory, of a dtype that every backend sends."""
    return tensor.detach().view(-1).view(torch.uint8)


def read_part(opened: OpenedModel, dtype: torch.dtype, member: int, degree: int) -> tuple[PreTrainedModel, PartlyRead]:
    """The model on its device with this rank's part of its weights; :meth:`PartlyRead.exchange` brings the others'.

    No rank waits for another. Raises UserError, among them UnfitDtype, as loading the whole model would.
    """
    model, found = opened.empty_model(dtype)
    checkpoint = PartlyRead(
        found.files, found.sources, found.shapes, found.dtypes, found.tied, member=member, degree=degree
    )
    try:
        fill(model, checkpoint, {}, opened.device)
    except torch.OutOfMemoryError as error:
        raise opened.too_large(dtype, error) from error
    return model, checkpoint
