"""The writers of a model as vLLM has built it, and edits of their weights.

vLLM keeps a row-parallel layer's weight as [D, K/tp] and experts' as [E, D, K/tp], our layouts, but on the CPU packs
both after loading, and forgets what it packed. :func:`keep_weights` has it keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.platforms import current_platform

from heretic_ds.ablation import Edit, Reduce
from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.edits.weights import WeightEditor, sum_over

_PLAIN = "unpacked_w2_weight"
"""Parameter of a module of experts that holds what was packed."""


class UnknownModel(Exception):
    """vLLM has built a model in which writers are not found, or not as they can be edited."""


def keep_weights() -> None:
    """On the CPU, have vLLM keep the weights that it packs; called before a model is loaded."""
    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    RowParallelLinear._cpu_skip_gemm_dispatch = True
    pack = CPUUnquantizedExperts.process_weights_after_loading

    def keeping(self: Any, layer: Any) -> None:
        plain = layer.get_parameter("w2_weight").detach().clone()
        pack(self, layer)
        layer.register_parameter(_PLAIN, nn.Parameter(plain, requires_grad=False))
        layer.pack_again = lambda: _pack_again(self, layer)

    CPUUnquantizedExperts.process_weights_after_loading = keeping


def _pack_again(experts: Any, layer: nn.Module) -> None:
    """Bring what the kernel reads in line with the plain weight, which was edited."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    plain, packed = layer.get_parameter(_PLAIN).detach(), layer.get_parameter("w2_weight").detach()
    if experts._use_zentorch:
        packed.copy_(plain)
        return
    missing = experts._padded_intermediate_size(experts.moe_config) - plain.shape[-1]
    packed.copy_(cpu_prepack_moe_weight(pad(plain, (0, missing)).contiguous(), experts.isa))


def find_writers(model: nn.Module, width: int, n_blocks: int, described: Sequence[Mapping[str, Any]]) -> Anatomy:
    """The anatomy of vLLM's model, from what the job knows of the original: its writers, relative to their blocks.

    vLLM names dense writers as transformers does, but not the blocks before them, nor experts. Raises UnknownModel
    where a writer is not found exactly once, is no row-parallel layer, or has been stored in another layout.
    """
    dense = [each for each in described if each["experts"] is None]
    found = [path for path, module in model.named_modules() if _holds_blocks(module, n_blocks, dense)]
    if len(found) != 1:
        wanted = ", ".join(sorted({each["path"] for each in dense}))
        raise UnknownModel(f"{len(found)} lists of {n_blocks} blocks with {wanted} in {type(model).__name__}")
    writers = [_writer(model, found[0], each, width) for each in described]
    return Anatomy("", found[0], "", "", n_blocks, width, tuple(writers))


def _holds_blocks(module: nn.Module, n_blocks: int, dense: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a module is a list of blocks in which all dense writers lie at their paths."""
    if not isinstance(module, nn.ModuleList) or len(module) != n_blocks:
        return False
    return all(_at(module[each["block"]], each["path"]) is not None for each in dense)


def _at(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _writer(model: nn.Module, blocks: str, described: Mapping[str, Any], width: int) -> Writer:
    block = f"{blocks}.{described['block']}"
    experts = described["experts"] is not None
    module, weight, bias = _experts(model, block) if experts else _dense(model, f"{block}.{described['path']}")
    norm, inner = (None if described[key] is None else f"{block}.{described[key]}" for key in ("norm", "inner_norm"))
    shape, wanted = tuple(model.get_parameter(weight).shape), (described["experts"], width) if experts else (width,)
    if shape[:-1] != wanted:
        raise UnknownModel(f"{weight} has the shape {list(shape)} and not {[*wanted, 'K']}")
    for path in filter(None, (norm, inner)):
        if _at(model, path) is None:
            raise UnknownModel(f"no module {path}, the norm behind {module}")
    return Writer(
        block=described["block"],
        component=described["component"],
        module=module,
        weight=weight,
        bias=bias,
        layout="EDK" if experts else "DK",
        norm=norm,
        norm_offset=described["norm_offset"],
        experts=described["experts"],
        inner_norm=inner,
    )


def _dense(model: nn.Module, path: str) -> tuple[str, str, str | None]:
    """Module, weight and bias of a dense writer; the bias only where this rank's output has it in it."""
    layer = model.get_submodule(path)
    if not isinstance(layer, RowParallelLinear) or not isinstance(getattr(layer, "weight", None), Tensor):
        raise UnknownModel(f"{path} is a {type(layer).__name__}, not an unquantised row-parallel layer")
    held = layer.bias is not None and not layer.skip_bias_add and (layer.reduce_results or layer.tp_rank == 0)
    return path, f"{path}.weight", f"{path}.bias" if held else None


def _experts(model: nn.Module, block: str) -> tuple[str, str, str | None]:
    """The module whose output is the sum over experts, and the names of their weight and bias."""
    inside = model.get_submodule(block)
    holders = [path for path, module in inside.named_modules() if hasattr(module, "w2_weight")]
    if len(holders) != 1:
        raise UnknownModel(f"{len(holders)} modules of experts in {block}")
    holder = f"{block}.{holders[0]}"
    layer = model.get_submodule(holder)
    runner = holder.rpartition(".")[0] if holder.endswith(".routed_experts") else holder
    name = _PLAIN if hasattr(layer, _PLAIN) else "w2_weight"
    return runner, f"{holder}.{name}", f"{holder}.w2_bias" if hasattr(layer, "w2_bias") else None


def sum_over_ranks() -> Reduce | None:
    """Adds up a tensor over the ranks between which every writer's inputs are split; None where there is one."""
    return None if get_tensor_model_parallel_world_size() == 1 else sum_over(get_tp_group().device_group)


class VllmEditor(WeightEditor):
    """Edits of the weights that vLLM computes with."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__(model, anatomy, sum_over_ranks())
        self._packed = {w.weight: model.get_submodule(w.weight.rpartition(".")[0]) for w in anatomy.writers}

    @torch.no_grad()
    def set_edit(self, edit: Edit | None) -> None:
        """See the base; packed weights follow the plain ones."""
        changed = set(self._edited)
        try:
            super().set_edit(edit)
        finally:
            for name in changed | self._edited:
                pack_again = getattr(self._packed[name], "pack_again", None)
                if pack_again is not None:
                    pack_again()
