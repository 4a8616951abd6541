"""A model cut over all ranks by DeepSpeed ZeRO-3, from its first number to the last trace of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint, TensorFiles
from heretic_ds.memory import give_back_memory, return_freed_blocks
from heretic_ds.placements.deepspeed import Originals
from heretic_ds.placements.zero3.loading import load_partitions
from heretic_ds.placements.zero3.offload import offload_section, remove_swap_files
from heretic_ds.world import World

if TYPE_CHECKING:
    from heretic_ds.checkpoint.open import OpenedModel
    from heretic_ds.placements.zero3 import Zero3


class Partitions:
    """A model cut over all ranks, and all that has to be undone to be rid of it."""

    def __init__(
        self, opened: OpenedModel, dtype: torch.dtype, anatomy: Anatomy, options: Zero3.Options, world: World
    ) -> None:
        """The model without numbers, and DeepSpeed's layout for it."""
        import deepspeed

        self._originals = Originals()
        return_freed_blocks(at_once=True)
        self._opened, self._dtype, self._anatomy, self._world = opened, dtype, anatomy, world
        self._hooks: Any = None
        self.model = opened.skeleton(dtype)
        self.config = deepspeed_config(options, self.model, anatomy, dtype, world.size)
        deepspeed.zero.Init.param_id = 0  # ranks compare these numbers, and a rank whose file is damaged stops counting
        self._init = deepspeed.zero.Init(config_dict_or_path=self.config)

    def load(self) -> None:
        """Read this rank's part of every parameter, and let DeepSpeed gather each where it is used.

        Raises UserError, on every rank, where a weight file is at fault on any of them.
        """
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import set_z3_leaf_module
        from deepspeed.utils.timer import NoopTimer

        self._world.agree(self._read, "reading the weights")
        for part in gathered_at_once(self.model, self._anatomy):
            set_z3_leaf_module(part, True)
        zero = self.config["zero_optimization"]
        self._hooks = DeepSpeedZeRoOffload(
            self.model,
            timers=NoopTimer(),
            ds_config=self.config,
            prefetch_bucket_size=zero["stage3_prefetch_bucket_size"],
            max_reuse_distance=zero["stage3_max_reuse_distance"],
            max_live_parameters=zero["stage3_max_live_parameters"],
            param_persistence_threshold=zero["stage3_param_persistence_threshold"],
            offload_param_config=DeepSpeedZeroConfig(**zero).offload_param,  # None without an offload
        )
        for hook in self._hooks.backward_hooks:  # nothing is trained here
            hook.remove()

    def _read(self) -> None:
        files = TensorFiles(self._opened.source.folder, self._opened.headers)
        checkpoint = Checkpoint.of(self.model, files, self._dtype)
        load_partitions(self.model, checkpoint, self._init, self._world.rank, self._world.size)

    @property
    def bytes_here(self) -> int:
        """Memory of this rank's parts."""
        parts = [getattr(parameter, "ds_tensor", None) for parameter in self.model.parameters()]
        return sum(part.nbytes for part in parts if part is not None)

    def release(self) -> None:
        """Give all memory back, close what was opened and undo what DeepSpeed did to this process.

        Hooks, closures and two tables that outlive every engine refer to the parameters in circles: each part is let go
        of by itself, so that memory does not depend on when the circles are collected.
        """
        if self._hooks is not None:
            self._hooks.destroy()
        for parameter in self.model.parameters():
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor = None
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        if self._init.param_swapper is not None:
            remove_swap_files(self._init.param_swapper)
        _forget_modules()
        self._originals.restore()
        del self.model, self._init, self._hooks
        return_freed_blocks(at_once=False)
        give_back_memory()


def _forget_modules() -> None:
    """Empty DeepSpeed's stack of running modules, whose bottom is the model, and its table of what to release."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for function in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(function, "__closure__", None) or ():  # a profiler's wrapper hides the table
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def deepspeed_config(
    options: Zero3.Options, skeleton: nn.Module, anatomy: Anatomy, dtype: torch.dtype, ranks: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration for these settings."""
    parts = max(len(list(part.parameters())) for part in gathered_at_once(skeleton, anatomy))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # it replaces functional.linear for the sake of gradients
            "stage3_prefetch_bucket_size": options.prefetch_bucket_size,
            "stage3_param_persistence_threshold": options.param_persistence_threshold,
            "stage3_max_live_parameters": options.max_live_parameters,
            "stage3_max_reuse_distance": options.max_reuse_distance,
            **offload_section(options, skeleton, parts, ranks),
        },
    }


def gathered_at_once(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The parts of every block, such as its attention and its MLP: modules whose weights are gathered together.

    Gathered module by module, a rank without a token for an expert would not take part in gathering that expert, and a
    convolution whose weight another module reads would not be gathered at all. Few large gathers are faster, too.
    """
    parts: list[nn.Module] = []
    for block in model.get_submodule(anatomy.blocks).children():
        children = list(block.children())
        listed = any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in children)  # never called as such
        parts += [block] if listed else children
    return [part for part in parts if any(True for _ in part.parameters())]
