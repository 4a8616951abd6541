"""Which device and dtype a model can run on, and whether its numbers are sound."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from heretic_ds.checkpoint.source import STORED_DTYPES, TensorInfo
from heretic_ds.errors import UserError
from heretic_ds.memory import host_memory

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def choose_device(name: str) -> torch.device:
    """The device `model.device` names; `auto` is CUDA where there is a device of it, else the CPU.

    Not any accelerator: sums are made in float64, which those of Apple do not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"model.device={name} is no device; expected auto, cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        return device
    usable = count if device.type == "cuda" else 0
    if (device.index or 0) >= usable:
        raise UserError(f"model.device={name}: {usable} such devices are usable here; set model.device=auto or cpu.")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def own_dtype(config: PreTrainedConfig, headers: Mapping[str, TensorInfo]) -> torch.dtype:
    """The checkpoint's dtype: as its configuration says, else of most of its numbers, else float32."""
    for part in (config, config.get_text_config()):
        stated = DTYPES.get(str(part.dtype).removeprefix("torch."))
        if stated is not None:
            return stated
    numbers: Counter[torch.dtype | None] = Counter()
    for info in headers.values():
        numbers[STORED_DTYPES.get(info.dtype)] += math.prod(info.shape)
    return max((dtype for dtype in DTYPES.values() if numbers[dtype]), key=numbers.__getitem__, default=torch.float32)


def dtype_candidates(wanted: str, own: torch.dtype, device: torch.device, parameters: int = 0) -> list[torch.dtype]:
    """Dtypes to try, best first. An explicit `wanted` is the only one.

    CPUs run float16 slowly and some operations not at all: there float16 becomes float32, which holds it
    exactly, or bfloat16 where `parameters` numbers of 4 bytes would not fit into memory. GPUs without
    bfloat16 get float16.
    """
    if wanted != "auto":
        if wanted not in DTYPES:
            raise UserError(f"model.dtype={wanted} is unknown; expected auto, float32, bfloat16 or float16.")
        return [DTYPES[wanted]]
    if own == torch.float16 and device.type == "cpu":
        roomy = 4 * parameters < 0.8 * host_memory()
        return [torch.float32, torch.bfloat16] if roomy else [torch.bfloat16]
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if own == torch.float16:
        return [torch.float16, torch.bfloat16, torch.float32] if has_bf16 else [torch.float16, torch.float32]
    if own == torch.bfloat16:
        return [torch.bfloat16 if has_bf16 else torch.float16, torch.float32]
    return [own]


@torch.no_grad()
def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer with a NaN or an infinity; one pass, without temporaries.

    A buffer may hold -inf, as masks do.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not finite(tensor, allow_minus_infinity=not isinstance(tensor, nn.Parameter)):
            return name
    return None


def finite(tensor: Tensor, allow_minus_infinity: bool = False) -> bool:
    """Whether no number is NaN or infinite; one pass, without temporaries."""
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))  # both are NaN if any number is
    return math.isfinite(high) and (math.isfinite(low) or (allow_minus_infinity and low == -math.inf))


@torch.no_grad()
def forward_problem(model: PreTrainedModel) -> str | None:
    """What is wrong with the logits of a few tokens, or None."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(1, 9, device=model.device) % vocabulary)[None]
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the model leaves no memory on {model.device} for a forward pass ({first_line(error)}); "
            "set model.device=cpu, or a smaller model.dtype."
        ) from error
    except RuntimeError as error:  # by kernels that a dtype lacks on this device: NotImplementedError is one, too
        return f"failed ({first_line(error)})"
    if logits.isnan().any() or (logits == math.inf).any() or not logits.isfinite().any():
        return "gave logits that are not finite"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def some_names(names: Iterable[str], shown: int = 4) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + rest
