"""Weights in 4 or 8 bits by bitsandbytes: packed as a model is loaded, or stored so in its files.

The numbers of 4 bits are NF4 in blocks of 64, whose scales are quantised themselves (Dettmers et al. 2023, arXiv
2305.14314); those of 8 bits have one scale a row (Dettmers et al. 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from heretic_ds.anatomy import packed_modules, scales, unpacked
from heretic_ds.checkpoint.fitness import finite
from heretic_ds.checkpoint.source import stated_quantization
from heretic_ds.errors import UserError
from heretic_ds.memory import give_back_memory
from heretic_ds.needs import check_bitsandbytes

log = logging.getLogger(__name__)

METHOD = "bitsandbytes"
"""What configurations of files that it packed call it."""
NONE = "none"
BITS = {"bnb_4bit": 4, "bnb_8bit": 8}
"""By the setting ``model.quantization``."""
BLOCK = 64
"""Numbers of 4 bits that share a scale."""


def in_words(quantization: str) -> str:
    """``weights in 4 bits by bitsandbytes``; empty for none."""
    return f"weights in {BITS[quantization]} bits by {METHOD}" if quantization in BITS else ""


def packages(quantization: str) -> tuple[str, ...]:
    """What a run depends on beside what every run does, by the names of packages."""
    return (METHOD,) if quantization in BITS else ()


def check_installed(path: str, quantization: str, method: str | None) -> None:
    """Refuse what bitsandbytes packs or has packed where it is not installed. Raises UserError."""
    if quantization != NONE or method == METHOD:
        what = f"model.path={path}, which is quantised with {METHOD},"
        check_bitsandbytes(what if quantization == NONE else f"model.quantization={quantization}")


def check_packing(
    path: str, quantization: str, raw: Mapping[str, Any], method: str | None, has_headers: bool
) -> str | None:
    """Refuse, before any weight is read, what cannot be packed, or be read as it is packed; else return ``method``.

    ``raw`` is the model's configuration, ``method`` that by which its files are quantised; ``has_headers``: whether
    they are safetensors. What is installed here does not count, so that a plan for another machine asks too. Raises
    UserError.
    """
    setting = f"model.quantization={quantization}"
    if quantization not in (NONE, *BITS):
        raise UserError(f"{setting} is unknown; choose one of {', '.join((NONE, *BITS))}")
    if quantization == NONE:
        return method
    if method not in (None, METHOD):
        raise UserError(f"{setting}: {path} is quantised with {method} already; set model.quantization={NONE}")
    if not has_headers:
        raise UserError(
            f"{setting}: the edited model is made from safetensors files, and {path} has pickled ones alone; convert "
            f"them, or set model.quantization={NONE}"
        )
    stored = _bits_stored(raw)
    if method == METHOD and stored != BITS[quantization]:
        known = next(name for name, bits in BITS.items() if bits == stored)
        raise UserError(f"{setting}: {path} is stored in {stored} bits; set model.quantization={known} or {NONE}")
    return method


def _bits_stored(raw: Mapping[str, Any]) -> int:
    part = stated_quantization(raw)
    return 8 if part.get("load_in_8bit") or part.get("_load_in_8bit") else 4


def packed_names(skeleton: PreTrainedModel, quantization: str, device: torch.device) -> list[str]:
    """Paths of the modules whose weights are packed as a model is loaded.

    Heads, embeddings that are tied to them and fused experts never are. On a CPU bitsandbytes (0.50.2) unpacks wrongly
    what it packed in 4 bits where its blocks do not end with rows, so those matrices stay as they are.
    """
    if quantization == NONE:
        return []
    left_out = get_keys_to_not_convert(skeleton) + list(skeleton._keep_in_fp32_modules or ())
    whole_blocks = BITS[quantization] == 4 and device.type == "cpu"
    return [
        name
        for name, module in skeleton.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, left_out)
        and not (whole_blocks and _inputs(module) % BLOCK)
    ]


def share_held(quantization: str) -> float:
    """Bytes of one number of a packed weight, with its part of the scales."""
    if quantization not in BITS:
        return 0.0
    # A byte for the scale of each block, and 4 for the scale of 256 of those; of 8 bits 4 for each row, which is long.
    return 0.5 + 1 / BLOCK + 4 / (256 * BLOCK) if BITS[quantization] == 4 else 1.0


def _inputs(module: Any) -> int:
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)


def loading_options(
    quantization: str, method: str | None, dtype: torch.dtype, device: torch.device, skeleton: Callable[[], Any]
) -> dict[str, Any] | None:
    """What transformers' loader is told where bitsandbytes has packed the files, or is to pack what they hold; None
    where neither is so."""
    if quantization == NONE and method != METHOD:
        return None
    options: dict[str, Any] = {"device_map": {"": str(device)}}
    if method is None:
        model = skeleton()
        packed = set(packed_names(model, quantization, device))
        kept = [name for name, module in model.named_modules() if name not in packed and not any(module.children())]
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=BITS[quantization] == 4,
            load_in_8bit=BITS[quantization] == 8,
            llm_int8_skip_modules=[f"{re.escape(name)}$" for name in kept],
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return options


def settle(model: PreTrainedModel, path: str, quantization: str, dtype: torch.dtype) -> None:
    """Make a model that was loaded with :func:`loading_options` one that computes in ``dtype`` everywhere, its weights
    packed, or, with ``quantization`` none, turned into plain matrices one at a time. Raises UserError for weights that
    are not finite."""
    found = list(packed_modules(model))
    if quantization != NONE and not found:
        log.warning("model.quantization=%s packs nothing of %s: no matrix of it can be", quantization, path)
    for name, module in found:
        if not finite(scales(module)):
            raise UserError(
                f"model.path={path}: {name}.weight holds NaN or infinite numbers; the checkpoint is damaged."
            )
        if quantization == NONE:
            model.set_submodule(name, _plain(module, dtype))
        elif hasattr(module, "compute_dtype"):
            _refuse_uneven(path, name, module)
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # On CPUs with AVX512-BF16 a first forward would pack weights anew, round their scales to bfloat16 and
            # compute in that, whatever the dtype.
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if quantization != NONE and parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()  # one that lies in a mapped file keeps all of that in memory
    give_back_memory()  # between what stays, the C library keeps as much as came and went: several times as much


def _refuse_uneven(path: str, name: str, module: Any) -> None:
    """Refuse what bitsandbytes computes with wrong numbers: see :func:`packed_names`."""
    block = module.weight.quant_state.blocksize
    if module.weight.device.type == "cpu" and module.in_features % block:
        raise UserError(
            f"model.path={path}: {name} has {module.in_features} inputs, no multiple of its blocks of {block} numbers "
            f"of 4 bits, which bitsandbytes unpacks wrongly on a CPU; set model.device=cuda, or "
            f"model.quantization={NONE}"
        )


def _plain(module: Any, dtype: torch.dtype) -> nn.Module:
    """The module that a packed one stands for, with weights that it computes with."""
    across = getattr(module, "source_cls", None) is Conv1D
    with torch.device("meta"):
        made: Any = (
            Conv1D(module.out_features, module.in_features)
            if across
            else nn.Linear(module.in_features, module.out_features, module.bias is not None)
        )
    weight_DK = unpacked(module).to(dtype)
    made.weight = nn.Parameter(weight_DK.T.contiguous() if across else weight_DK, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return made.eval()
