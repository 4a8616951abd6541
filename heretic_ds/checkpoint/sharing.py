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
    """Tensors of which each rank has read so many rows, by its place; what is left at the end all have read."""
    lent: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors that one rank alone has read, each with that rank's place."""

    def read_into(self, name: str, shard: Shard, part: Tensor) -> None:
        """Read this rank's rows of a tensor that will be whole on every rank."""
        rows = part.shape[0] // self.degree if part.dim() else 0
        if part.nbytes < _SMALL_BYTES:
            super().read_into(name, shard, part)
        elif rows == 0 or not isinstance(self.sources[name], Assembled):  # the latter is made of whole tensors
            read = [sum(tensor.nbytes for tensor, owner in self.lent if owner == place) for place in range(self.degree)]
            owner = read.index(min(read))
            self.lent.append((part, owner))
            if owner == self.member:
                super().read_into(name, shard, part)
        else:
            self.split.append((part, rows))
            first, rest = self.member * rows, self.degree * rows
            for start, stop in ((first, first + rows), (rest, part.shape[0])):
                if start < stop:
                    super().read_into(name, Shard(shard.shape, 0, ((start, stop),)), part[start:stop])

    def exchange(self, group: dist.ProcessGroup | None) -> None:
        """Complete all tensors. ``group`` are the ranks that read together, in the order of their places; each has read
        its part."""
        for whole, rows in self.split if group is not None else []:
            own = whole[self.member * rows : (self.member + 1) * rows]
            dist.all_gather_into_tensor(_as_bytes(whole[: self.degree * rows]), _as_bytes(own), group=group)
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
