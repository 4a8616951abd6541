"""An edit as a LoRA adapter in the files of `peft`, which `peft`, transformers and vLLM read.

A linear writer is one of ``target_modules``: ``lora_A`` [R, K], ``lora_B`` [D, R], the weight W + BA. Fused experts are
one of ``target_parameters``, all experts in two matrices: ``lora_A`` [E·R, K] with expert e in the rows eR to eR + R,
``lora_B`` [D, R·E] with expert e in the columns e, E + e, 2E + e, ... One rank holds for all, with a scaling of 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heretic_ds.ablation import LowRank
from heretic_ds.anatomy import Writer
from heretic_ds.checkpoint import Checkpoint
from heretic_ds.checkpoint.source import is_whole
from heretic_ds.edits.adapters import AdaptedWriter, Adapter

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"
"""Where the adapter lies in the folder of a model that is exported with it."""
PREFIX = "base_model.model."


def resident_writer(model: nn.Module, writer: Writer) -> tuple[Tensor, Tensor | None]:
    """A writer's weight in memory, and the gain of the norms behind it."""
    return writer.numbers_DK(model), writer.norm_gain(model)


def stored_writer(checkpoint: Checkpoint, writer: Writer) -> tuple[Tensor, Tensor | None]:
    """The same from the checkpoint's files, for a model that no process holds whole."""
    cpu = torch.device("cpu")
    weight = checkpoint.read(writer.weight, checkpoint.whole(writer.weight), cpu)
    across = writer.layout in ("KD", "EKD")
    return weight.transpose(-1, -2) if across else weight, stored_gain(checkpoint, writer)


def stored_gain(checkpoint: Checkpoint, writer: Writer) -> Tensor | None:
    """The gain of the norms behind a writer, read from the checkpoint."""
    return writer.gain_by(lambda name: checkpoint.read(name, checkpoint.whole(name), torch.device("cpu")))


def write_adapter(folder: Path, adapter: Adapter, model: nn.Module, base_model: str) -> int:
    """Write the adapter's two files to a folder; the number of its tensors. ``model``, whose weights may be on the meta
    device, tells how its experts lie in memory."""
    folder.mkdir(exist_ok=True)
    tensors = _tensors(adapter, model)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_config(adapter, base_model), indent=2, ensure_ascii=False)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    return len(tensors)


def holds_export(folder: Path, form: str) -> bool:
    """Whether a folder holds all files of an export of a form: ``model``, ``adapter`` or ``both``."""
    place = folder if form == "adapter" else folder / ADAPTER_FOLDER
    adapted = form == "model" or all((place / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return adapted and (form == "adapter" or is_whole(folder))


def _config(adapter: Adapter, base_model: str) -> dict[str, Any]:
    writers = [adapted.writer for adapted in adapter.writers]
    fused = any(writer.experts is not None for writer in writers)
    # peft takes names of modules that end like those of experts before transformers 5 for experts, and adapts all of
    # them; a linear MLP writer beside experts is therefore named by its parameter.
    by_parameter = {writer.weight for writer in writers if fused and writer.component == "mlp"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(writer.layout == "KD" for writer in writers),
        "target_modules": [writer.module for writer in writers if writer.weight not in by_parameter],
        "target_parameters": sorted(by_parameter) or None,
    }


def _tensors(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for adapted in adapter.writers:
        parts = [_of_rank(part, adapter.rank) for part in adapted.parts]
        if adapted.writer.experts is None:
            in_RK, out_DR = parts[0]
        else:
            in_RK, out_DR = _fused(model, adapted, parts)
        name = f"{PREFIX}{adapted.writer.module}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = in_RK.contiguous(), out_DR.contiguous()
    return tensors


def _of_rank(part: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to a rank."""
    missing, pad = rank - part.rank, torch.nn.functional.pad
    return pad(part.in_RK, (0, 0, 0, missing)), pad(part.out_DR, (0, missing))


def is_swapped(model: nn.Module, writer: Writer) -> bool:
    """Whether what peft takes for the input of fused experts is their output: it asks the module alone whether its
    weights are [E, K, D], and where they are, the module may not say so."""
    transposed = getattr(model.get_submodule(writer.module), "is_transposed", False)
    return writer.layout == "EKD" and not transposed


def _fused(model: nn.Module, adapted: AdaptedWriter, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All experts' matrices as two."""
    if is_swapped(model, adapted.writer):
        parts = [(out_DR.T, in_RK.T) for in_RK, out_DR in parts]
    first = torch.cat([first for first, _ in parts])
    second_DRE = torch.stack([second for _, second in parts], dim=-1)
    return first, second_DRE.flatten(1)
