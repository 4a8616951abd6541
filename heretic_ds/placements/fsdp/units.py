"""A model cut over all ranks by FSDP2, from its first number to the last trace of it.

A unit is what is gathered together: a block, an embedding, the output head; the rest, which is little, is gathered for
a whole pass. FSDP2 offers no way to give a rank its own numbers alone, in memory that tied parameters share, to go on
after a pass that failed, and to be rid of it: for these the inner objects of PyTorch's are used, as 2.13 has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard as CutAlong
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint, Shard
from heretic_ds.memory import give_back_memory, return_freed_blocks
from heretic_ds.world import World

_WASTE = 0.01
"""Share of a parameter that may be padding before it is cut along another dimension."""


@dataclass(frozen=True)
class Part:
    """What this rank holds of one parameter."""

    shard: Shard
    padded: Tensor
    """With room for as much as any rank holds, since equal parts are gathered."""

    @property
    def own(self) -> Tensor:
        """The numbers, without the room that is left."""
        return self.padded.narrow(self.shard.dim, 0, self.shard.local_shape[self.shard.dim])

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of the parameter's shape: a view."""
        ((start, stop),) = self.shard.ranges or ((0, 0),)
        return whole.narrow(self.shard.dim, start, stop - start)


class Units:
    """A model cut over all ranks, and all that has to be undone to be rid of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        world: World,
        device: torch.device,
        rests_on_host: bool = False,
        pin_memory: bool = True,
    ) -> None:
        """Lay out an empty model, all ranks together. ``rests_on_host``: blocks that are not in use lie in host
        memory, if ``pin_memory`` in page-locked one."""
        return_freed_blocks(at_once=True)
        self.model, self._checkpoint, self._anatomy, self._world = model, checkpoint, anatomy, world
        self._device, self._on_host, self._pinned = device, rests_on_host, rests_on_host and pin_memory
        self.parts: dict[str, Part] = {}
        """By name in the model's state; those of tied parameters are one."""
        self._whole: list[Tensor] = []
        _untie(model, checkpoint)
        mesh, scalars = init_device_mesh(device.type, (world.size,)), {p for p in model.parameters() if p.dim() == 0}
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": True,
            "shard_placement_fn": lambda parameter: CutAlong(_dim(tuple(parameter.shape), world.size)),
        }
        if scalars:
            options["ignored_params"] = scalars
        for block in model.get_submodule(anatomy.blocks).children():
            fully_shard(block, **options, offload_policy=self._policy())
        for module in [*_units_beside_blocks(model, anatomy), model]:
            fully_shard(module, **options)
        # Runs whatever happens in a pass; FSDP2's own hooks have been called by then.
        model.register_forward_hook(lambda model, args, output: settle(model, output is None), always_call=True)

    def _policy(self) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=self._pinned) if self._on_host else OffloadPolicy()

    @torch.no_grad()
    def read(self) -> None:
        """Read this rank's part of every parameter, and the buffers. Raises UserError for numbers that are not finite.

        Other ranks are not needed.
        """
        managed = {(id(m.module), m.param_name): p for p in _parameters(self.model) for m in (p._module_info,)}
        for path, module in self.model.named_modules():
            for attribute, old in list(module._parameters.items()):
                name = f"{path}.{attribute}" if path else attribute
                if old is None:
                    continue
                fsdp_parameter = managed.get((id(module), attribute))
                if fsdp_parameter is None:
                    whole = self._read_whole(name)
                    module._parameters[attribute] = nn.Parameter(whole, requires_grad=False)
                    self._whole.append(whole)
                else:
                    self._put(name, fsdp_parameter)
            for attribute, buffer in module._buffers.items():
                name = f"{path}.{attribute}" if path else attribute
                if buffer is not None and name in self._checkpoint.shapes:
                    module._buffers[attribute] = self._read_whole(name)
                elif buffer is not None:
                    module._buffers[attribute] = buffer.to(self._device)

    def _read_whole(self, name: str) -> Tensor:
        return self._checkpoint.read(name, self._checkpoint.whole(name), self._device)

    def _put(self, name: str, parameter: Any) -> None:
        """Give one of FSDP2's parameters its numbers, in memory that others tied to it have, too."""
        first = self._checkpoint.tied.get(name, name)
        if first not in self.parts:
            self.parts[first] = self._read_part(name, on_host=parameter.offload_to_cpu)
        part = self.parts[name] = self.parts[first]
        parameter.sharded_param = nn.Parameter(parameter.to_sharded_dtensor(part.own), requires_grad=False)
        parameter._sharded_param_data = part.padded.view(-1)
        parameter._setattr_on_modules(parameter.sharded_param)

    def _read_part(self, name: str, on_host: bool) -> Part:
        shape, ranks = self._checkpoint.shapes[name], self._world.size
        dim = _dim(shape, ranks)
        size, each = shape[dim], -(-shape[dim] // ranks)
        start, stop = (min(place * each, size) for place in (self._world.rank, self._world.rank + 1))
        room, dtype = (*shape[:dim], each, *shape[dim + 1 :]), self._checkpoint.dtypes[name]
        where = torch.device("cpu") if on_host else self._device
        padded = torch.empty(room, dtype=dtype, device=where, pin_memory=on_host and self._pinned)
        part = Part(Shard(shape, dim, ((start, stop),)), padded)
        if start < stop:
            self._checkpoint.read_into(name, part.shard, part.own)
        padded.narrow(dim, stop - start, each - (stop - start)).zero_()
        return part

    @property
    def bytes_here(self) -> int:
        """Memory of this rank's parts."""
        kept = {part.padded.data_ptr(): part.padded for part in self.parts.values()}
        return sum(tensor.nbytes for tensor in (*kept.values(), *self._whole))

    def release(self) -> None:
        """Give all memory back.

        Hooks and tables refer to parameters in circles: each part is let go of by itself, so that memory does not
        depend on when the circles are collected.
        """
        settle(self.model, failed=True)
        for parameter in _parameters(self.model):
            nothing = torch.empty(0)
            parameter._module_info.module._parameters.pop(parameter._module_info.param_name, None)
            parameter.sharded_param = parameter._sharded_param_data = nothing
            parameter.all_gather_outputs = []
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param = nothing
        del self.model, self._checkpoint
        self.parts.clear()
        self._whole.clear()
        return_freed_blocks(at_once=False)
        give_back_memory()


@contextmanager
def gathered(model: nn.Module, anatomy: Anatomy, block: int) -> Iterator[None]:
    """While the context lasts, the parameters of a block are whole on every rank; all of them have to enter together.

    What is written into them is lost. Never in inference mode, which would leave its mark on memory that is used again.
    """
    unit: Any = list(model.get_submodule(anatomy.blocks).children())[block]
    with torch.inference_mode(False), torch.no_grad():
        try:
            unit.unshard()
            yield
        except BaseException:
            settle(model, failed=True)
            raise
        unit.reshard()


def settle(model: nn.Module, failed: bool) -> None:
    """Make ready for the next pass: forget the order of units, noted for a backward pass that never comes, and bring
    all units of a pass that ``failed`` into the state before it."""
    root: Any = model
    if failed and torch.cuda.is_available():
        torch.cuda.synchronize()  # copies that still run read and write what is freed now
    for state in root._get_fsdp_state()._state_ctx.all_states:  # none before the first pass
        state._comm_ctx.post_forward_order.clear()
        group = state._fsdp_param_group
        if group is not None:
            group._post_forward_indices.clear()
        if not failed:
            continue
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        state._comm_ctx.all_gather_state = None
        if group is not None:
            group._all_gather_result, group._training_state = None, type(group._training_state).IDLE
            group._to_sharded()
            for parameter in group.fsdp_params:  # of a unit that was not gathered to the end
                parameter.free_unsharded_param()


def _parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP2's objects for the parameters that it has cut."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            yield from group.fsdp_params if group is not None else ()


def _untie(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Make every name of an empty model a parameter of its own, in its own dtype: units cannot share one, and gather
    it for themselves out of the same memory."""
    for path, module in model.named_modules():
        for attribute, old in module._parameters.items():
            if old is not None:
                dtype = checkpoint.dtypes[f"{path}.{attribute}" if path else attribute]
                module._parameters[attribute] = nn.Parameter(torch.empty_like(old, dtype=dtype), requires_grad=False)


def _dim(shape: tuple[int, ...], ranks: int) -> int:
    """The dimension along which a parameter is cut: the first, or where much of that would be padding, as for fewer
    experts than ranks, the first that divides evenly."""
    size = shape[0]
    if -(-size // ranks) * ranks <= (1 + _WASTE) * size:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0)


def bytes_cut(model: nn.Module, ranks: int) -> int:
    """Bytes of one rank's parts of a model on the meta device, with what pads them; tied parameters once."""
    size = 0
    for parameter in model.parameters():
        shape = tuple(parameter.shape)
        if not shape:  # whole everywhere
            size += parameter.nbytes
            continue
        dim = _dim(shape, ranks)
        size += parameter.nbytes // shape[dim] * -(-shape[dim] // ranks)
    return size


def _units_beside_blocks(model: PreTrainedModel, anatomy: Anatomy) -> list[nn.Module]:
    """What is gathered by itself beside the blocks: large tables, the head, and towers that no text passes through."""
    decoder, found = model.get_submodule(anatomy.decoder), [model.get_submodule(anatomy.embedding)]
    found += [child for child in decoder.children() if isinstance(child, nn.Embedding)]
    steps = anatomy.decoder.split(".") if anatomy.decoder else []
    for depth, step in enumerate(steps):
        parent = model.get_submodule(".".join(steps[:depth]))
        found += [child for name, child in parent.named_children() if name != step]
    return [module for module in dict.fromkeys(found) if any(True for _ in module.parameters())]
