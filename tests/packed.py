"""Tiny checkpoints in FP8 and MXFP4, and the same ones as transformers dequantises them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from tests import families

BLOCK = (4, 8)
"""Divides every matrix of the tiny models of ``PACKED``: where it does not, transformers does not read them."""
PACKED = {"llama": "fp8", "qwen3": "fp8", "qwen3_moe": "fp8", "gpt_oss": "mxfp4"}
_KEPT = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "gate.weight", "layernorm.weight")


def save(family: str, folder: Path, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A family's model packed in the way that is usual for it; others in FP8."""
    if PACKED.get(family, "fp8") == "mxfp4":
        return save_mxfp4(folder, dtype)
    families.save(family, folder, dtype=dtype)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name, tensor in tensors.items() if tensor.dim() == 2 and not name.endswith(_KEPT)]:
            tensors[name], tensors[f"{name}_scale_inv"] = packed_fp8(tensors[name], block)

    rewrite(folder, pack)
    return state_packing(
        folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=list(block),
        modules_to_not_convert=["lm_head"],
    )  # fmt: skip


def packed_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [R, C]; blocks at its ends may be smaller."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.empty(down, across)
    for i in range(down):
        for j in range(across):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = part.abs().max().float() / 448
    return (weight.float() / spread(scales, block, (rows, columns))).to(torch.float8_e4m3fn), scales


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The scale of every number."""
    return scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[0], : shape[1]]


def save_mxfp4(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A gpt-oss whose experts are in MXFP4, each number the nearest code by the scale of its 32."""
    config = families.REQUIRED["gpt_oss"]()
    config.intermediate_size = 64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    families.randomise(model)
    model.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed_mxfp4(tensors.pop(name))

    rewrite(folder, pack)
    return state_packing(folder, quant_method="mxfp4", modules_to_not_convert=["lm_head"])


def packed_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [E, D, G, 16] and exponents [E, D, G] of experts [E, 32 G, D]."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp_min(2.0**-100).log2().ceil().int()
    scaled = torch.ldexp(groups, -exponents[..., None])
    codes = torch.bucketize(scaled.abs().contiguous(), (numbers[1:] + numbers[:-1]) / 2) + 8 * (scaled < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def state_packing(folder: Path, **stated: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": stated}))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The weights of a folder with one file, changed in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def dequantised(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model as transformers loads it, dequantised. (It leaves experts in bfloat16 whatever it is asked for.)"""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    known = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=known(dequantize=True))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.dtype == torch.bfloat16 else parameter.data
    return model


def save_dequantised(folder: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """What transformers makes of a packed checkpoint, as an ordinary one."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(dequantised(folder, dtype).state_dict())
    model.save_pretrained(target)
    families.tokenizer().save_pretrained(target)
    return target
