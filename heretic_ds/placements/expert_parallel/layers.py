"""DeepSpeed's AutoEP over a model without weights: its blocks of experts become layers that hold a rank's own experts.

AutoEP finds the blocks and builds its layers out of the whole model's. Here that model is empty: the layers come out
empty too, and each rank reads the experts it owns from the files. Whatever an engine of DeepSpeed's would add is for
training.

Shapes: E experts, D width, K inner width of an expert.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy, Writer
from heretic_ds.checkpoint import Checkpoint, Shard, fill, parameters_on_meta
from heretic_ds.checkpoint.fitness import first_line, some_names
from heretic_ds.checkpoint.shards import share
from heretic_ds.errors import UserError
from heretic_ds.needs import check_deepspeed
from heretic_ds.placements.deepspeed import quietly, start_deepspeed

log = logging.getLogger(__name__)

_GROUPED_ALIGNMENT = 16
"""Bytes of which the rows of a grouped matrix product have to be a multiple."""

FLOAT32_ROUTERS = frozenset({"deepseek_v2", "deepseek_v3"})
"""Presets of families that compute a router's logits in float32 whatever the weights are in; AutoEP's layers do not."""


class ExpertLayers:
    """What AutoEP makes of one model's blocks of experts, over ``degree`` ranks."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, degree: int, phase: str, device: torch.device) -> None:
        """Look at an empty model that is to run on ``device``, and leave it as it is.

        Raises UserError, naming the settings of ``phase``, where AutoEP does not know its family, or its experts
        cannot be divided.
        """
        self._model, self._anatomy, self._degree, self._device = model, anatomy, degree, device
        self._otherwise = f"set {phase}=tensor_parallel"
        self._parser, self._specs = self._detect(phase)
        self._check_experts(phase)

    def _detect(self, phase: str) -> tuple[Any, list[Any]]:
        """AutoEP, and its description of each block of experts."""
        check_deepspeed(f"{phase}=expert_parallel")
        with quietly():
            from deepspeed.module_inject.auto_ep import AutoEP
            from deepspeed.module_inject.auto_ep_config import AutoEPConfig
            from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS, preset_name_for_hf_model_type

        kind = self._model.config.model_type
        preset = preset_name_for_hf_model_type(kind)
        if preset is None:
            known = sorted(name for entry in PRESET_MODELS.values() for name in entry.hf_model_types)
            raise UserError(
                f"{phase}=expert_parallel: DeepSpeed's AutoEP has no preset for a {kind} model, only for "
                f"{', '.join(known)}; {self._otherwise}"
            )
        config = AutoEPConfig(
            enabled=True, autoep_size=self._degree, preset_model=preset, use_grouped_mm=self._grouped()
        )
        try:
            parser = AutoEP(self._model, config)
            return parser, parser.ep_parser()
        except (ValueError, AttributeError, NotImplementedError) as error:  # for layouts that DeepSpeed does not know
            raise UserError(
                f"{phase}=expert_parallel: DeepSpeed's AutoEP cannot serve this {kind} model ({first_line(error)}); "
                f"{self._otherwise}"
            ) from error

    def _grouped(self) -> bool:
        """Whether experts run in one grouped product, which takes bfloat16 rows of certain sizes on CUDA devices."""
        rows = [writer.weight_DK(self._model).shape[-2:] for writer in self._expert_writers()]
        aligned = all(size * self._model.dtype.itemsize % _GROUPED_ALIGNMENT == 0 for row in rows for size in row)
        wanted = self._device.type == "cuda" and self._model.dtype == torch.bfloat16
        return wanted and aligned and hasattr(torch, "_grouped_mm")

    def _expert_writers(self) -> list[Writer]:
        return [writer for writer in self._anatomy.writers if writer.experts is not None]

    def _check_experts(self, phase: str) -> None:
        """Refuse experts that AutoEP has not found, keeps in another layout than is read here, or cannot divide."""
        found = {f"{spec.moe_module_name}.{spec.experts_name}": spec for spec in self._specs}
        for writer in self._expert_writers():
            spec, experts = found.get(writer.module), writer.experts or 0
            fused = spec is not None and spec.expert_storage == "fused_3d" and spec.expert_w3_name is None
            if not fused or writer.layout != "EDK" or writer.bias is not None:
                raise UserError(
                    f"{phase}=expert_parallel: DeepSpeed's AutoEP does not take the experts at {writer.module} as they "
                    f"lie in this {self._model.config.model_type} model; {self._otherwise}"
                )
            if experts % self._degree:
                raise UserError(
                    f"{phase}.degree={self._degree} does not divide the {experts} experts of "
                    f"{writer.module}; choose a divisor of {experts}, or {self._otherwise}"
                )

    def replace(self, group: dist.ProcessGroup | None) -> Anatomy:
        """Put AutoEP's layers, empty, in the place of the blocks; the writers of the model as it is then.

        ``group`` are the ranks that share the experts; None for one rank.
        """
        start_deepspeed()
        with quietly():
            import deepspeed.moe.ep_kernels  # noqa: F401 - which says what it lacks, in the first forward otherwise
        member = 0 if group is None else dist.get_rank(group)
        said = io.StringIO()
        with parameters_on_meta(), contextlib.redirect_stdout(said):
            self._parser.replace_moe_layers(self._specs, ep_size=self._degree, ep_rank=member)
        log.debug("DeepSpeed: %s", said.getvalue().strip())
        for spec, layer in zip(self._specs, self._layers(), strict=True):
            layer.ep_group = group  # DeepSpeed's own groups are made once a process, for one layout of the world
            if getattr(layer, spec.router_name, None) is layer.router:
                delattr(layer, spec.router_name)  # a second name, under which all of it would be found again
            if spec.model_family in FLOAT32_ROUTERS:
                layer.router.gate = _InFloat32(layer.router.gate)
        self._model.eval()
        return replace(self._anatomy, writers=tuple(self._moved(writer) for writer in self._anatomy.writers))

    def _layers(self) -> list[Any]:
        return [self._model.get_submodule(spec.moe_module_name) for spec in self._specs]

    def _moved(self, writer: Writer) -> Writer:
        """The same writer in the converted model, as far as it lies on this rank."""
        for spec in self._specs:
            if writer.module == f"{spec.moe_module_name}.{spec.experts_name}":
                return replace(
                    writer,
                    module=f"{spec.moe_module_name}.experts",
                    weight=f"{spec.moe_module_name}.experts.w2",
                    experts=spec.num_experts // self._degree,
                )
        module = renamed(writer.module, self._renamings())
        return replace(
            writer,
            module=module,
            weight=f"{module}.{writer.weight.rpartition('.')[2]}",
            bias=None if writer.bias is None else f"{module}.{writer.bias.rpartition('.')[2]}",
        )

    def _renamings(self) -> dict[str, str]:
        """Paths that AutoEP's layers have given other names."""
        renamings: dict[str, str] = {}
        for spec in self._specs:
            block = spec.moe_module_name
            renamings[f"{block}.{spec.router_name}"] = f"{block}.router.gate"
            if spec.e_score_correction_bias_path is not None:
                owner = f"{block}.{spec.e_score_correction_bias_path}".rstrip(".")
                renamings[f"{owner}.e_score_correction_bias"] = f"{block}.router.e_score_correction_bias"
            if spec.has_shared_experts:
                renamings[f"{block}.{spec.shared_experts_name}"] = f"{block}.shared_experts"
            if spec.shared_experts_gate_name:
                renamings[f"{block}.{spec.shared_experts_gate_name}"] = f"{block}.shared_experts_gate"
        return renamings

    def fill(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Read the weights of the converted model: of the experts this rank's own, of everything else all.

        ``checkpoint`` is that of the model before. Raises UserError where a file is at fault.
        """
        experts = {f"{spec.moe_module_name}.{spec.experts_name}." for spec in self._specs}
        others = [name for name in checkpoint.shapes if not any(name.startswith(path) for path in experts)]
        names = {name: renamed(name, self._renamings()) for name in others}
        self._check_names(set(names.values()))
        for layer in self._layers():  # a count of tokens, which training would balance by
            layer.tokens_per_expert = torch.zeros(layer.num_experts, device=device)
        for spec, layer in zip(self._specs, self._layers(), strict=True):
            self._fill_experts(spec, layer, checkpoint, device)
        fill(self._model, _under(checkpoint, names), {}, device)

    def _check_names(self, names: set[str]) -> None:
        """Refuse to go on where AutoEP's layers have other tensors, beside the experts, than the blocks had."""
        own = {f"{spec.moe_module_name}.experts.{weight}" for spec in self._specs for weight in ("w1", "w2", "w3")}
        strange = names ^ (set(self._model.state_dict()) - own)
        if strange:
            raise UserError(
                f"DeepSpeed's AutoEP does not keep {some_names(sorted(strange))} of this "
                f"{self._model.config.model_type} model; {self._otherwise}"
            )

    def _fill_experts(self, spec: Any, layer: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        """Read this rank's experts; gate and up projection, which lie in one tensor, through memory for one expert."""
        path = f"{spec.moe_module_name}.{spec.experts_name}"
        both, down = f"{path}.{spec.expert_w1_name}", f"{path}.{spec.expert_w2_name}"
        start, stop = share(spec.num_experts, layer.ep_rank, self._degree)
        down_EDK = checkpoint.read(down, Shard(checkpoint.shapes[down], 0, ((start, stop),)), device)
        inner = down_EDK.shape[-1]
        gate_EKD = torch.empty((stop - start, inner, down_EDK.shape[1]), dtype=checkpoint.dtypes[both], device=device)
        up_EKD = torch.empty_like(gate_EKD)
        shape = checkpoint.shapes[both]
        one = torch.empty((1, *shape[1:]), dtype=gate_EKD.dtype, device=device)
        for place, expert in enumerate(range(start, stop)):
            checkpoint.read_into(both, Shard(shape, 0, ((expert, expert + 1),)), one)
            gate_EKD[place], up_EKD[place] = one[0, :inner], one[0, inner:]
        for name, weight in {"w1": gate_EKD, "w2": down_EDK, "w3": up_EKD}.items():
            setattr(layer.experts, name, nn.Parameter(weight, requires_grad=False))


class _InFloat32(nn.Linear):
    """A router's projection that computes in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


def renamed(name: str, renamings: Mapping[str, str]) -> str:
    """A path or name with the longest of its beginnings that has another name replaced by it."""
    fitting = (path for path in renamings if f"{name}.".startswith(f"{path}."))
    longest = max(fitting, key=len, default="")
    return renamings.get(longest, "") + name.removeprefix(longest)


def _under(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The part of a checkpoint that ``names`` lists, under the names that it gives."""
    return replace(
        checkpoint,
        sources={new: checkpoint.sources[old] for old, new in names.items()},
        shapes={new: checkpoint.shapes[old] for old, new in names.items()},
        dtypes={new: checkpoint.dtypes[old] for old, new in names.items()},
        tied={names[old]: names[first] for old, first in checkpoint.tied.items()},
    )
