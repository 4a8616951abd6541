"""Filling the modules of an empty model with this rank's parts of its weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds import progress
from heretic_ds.checkpoint.conversions import Source, find_sources
from heretic_ds.checkpoint.files import TensorFiles
from heretic_ds.checkpoint.fitness import finite, some_names
from heretic_ds.checkpoint.shards import Shard
from heretic_ds.errors import UnfitDtype, UserError

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """What is known of a model's state before any of it is read; made from the model while it is empty and whole."""

    files: TensorFiles
    sources: Mapping[str, Source]
    """By name in the model's state, aliases of tied parameters included."""
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    tied: Mapping[str, str] = field(default_factory=dict)
    """Further names of a parameter -> its first name."""

    @classmethod
    def of(cls, model: PreTrainedModel, files: TensorFiles, dtype: torch.dtype) -> Checkpoint:
        """The state of `model`, whose parameters are on the meta device, in `dtype` but for what is kept in float32.

        Raises UserError where the checkpoint lacks a tensor, or has it in another shape.
        """
        state = model.state_dict()
        sources, unused = find_sources(model, files.shapes)
        tied = _tied_names(model)
        for name, first in tied.items():
            known = sources.get(first) or sources.get(name)
            if known is not None:
                sources[name] = sources[first] = known
        missing = [name for name in state if name not in sources]
        if missing:
            raise UserError(
                f"the weight files lack {some_names(missing)}, which {type(model).__name__} needs; "
                "the checkpoint is incomplete"
            )
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        unused = [name for name in unused if not any(pattern.search(name) for pattern in ignored)]
        if unused:
            log.warning("not used by %s: %s", type(model).__name__, some_names(unused))
        return cls(
            files=files,
            sources=sources,
            shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
            dtypes={name: _dtype(model, name, tensor, dtype) for name, tensor in state.items()},
            tied=tied,
        )

    def read(self, name: str, shard: Shard, device: torch.device) -> Tensor:
        """This rank's part of one tensor of the model's state."""
        part = torch.empty(shard.local_shape, dtype=self.dtypes[name], device=device)
        self.read_into(name, shard, part)
        return part

    def read_into(self, name: str, shard: Shard, part: Tensor) -> None:
        """:meth:`read` into memory that is there already."""
        if shard.zeroed:
            part.zero_()
        else:
            self.sources[name].read(self.files, shard, part)
        if not finite(part):
            raise UnfitDtype(
                f"tensor {name} of the checkpoint holds NaN or infinite numbers in {part.dtype}; the checkpoint is "
                "damaged, or model.dtype too narrow for it"
            )

    def whole(self, name: str) -> Shard:
        """All of one tensor, for a rank that keeps it whole."""
        return Shard(self.shapes[name])


@torch.no_grad()
def fill(model: nn.Module, checkpoint: Checkpoint, shards: Mapping[str, Shard], device: torch.device) -> None:
    """Give every parameter of `model` its numbers: those of its shard, or all of them where it has none.

    Parameters on the meta device get memory on `device`; others are filled where they are. Tied parameters stay one
    where their shards agree. Buffers that the checkpoint holds are filled, all others only moved.
    """
    with progress.work("tensors", len(checkpoint.shapes), "tensors") as work:
        _fill_parameters(model, checkpoint, shards, device, work)
    for module in model.modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                if buffer.is_meta:
                    raise RuntimeError(f"buffer {attribute} of {type(module).__name__} has no numbers")
                module._buffers[attribute] = buffer.to(device)


def _fill_parameters(
    model: nn.Module, checkpoint: Checkpoint, shards: Mapping[str, Shard], device: torch.device, work: progress.Work
) -> None:
    made: dict[tuple[str, Shard], nn.Parameter] = {}
    for name in checkpoint.shapes:
        work.advance()
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        shard = shards.get(name) or checkpoint.whole(name)
        if attribute in module._buffers:
            module._buffers[attribute] = checkpoint.read(name, shard, device)
            continue
        key = (checkpoint.tied.get(name, name), shard)
        parameter = module._parameters[attribute]
        if key not in made and parameter is not None and not parameter.is_meta:
            there, part = list(parameter.shape), list(shard.local_shape)
            if there != part:
                raise RuntimeError(f"{name} has room for {there}, but its part is {part}")
            checkpoint.read_into(name, shard, parameter.data)
            made[key] = parameter
        elif key not in made:
            made[key] = nn.Parameter(checkpoint.read(name, shard, device), requires_grad=False)
        module._parameters[attribute] = made[key]


def _tied_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(same)] for name, same in named if first.setdefault(id(same), name) != name}


def _dtype(model: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype transformers would load a tensor: some stay in float32 whatever the rest is in."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    for pattern in kept:
        if re.search(pattern.replace(".", r"\.").replace("*", r".*"), name):
            return torch.float32
    return tensor.dtype
