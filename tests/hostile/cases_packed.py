"""Hostile models whose weights are packed: in FP8 whose scales are not there, do not fit, or are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests import packed
from tests.hostile.harness import Case, Place, Spoil

_WEIGHT = "model.layers.2.self_attn.o_proj.weight"
_SCALE = f"{_WEIGHT}_scale_inv"
_EXPERTS = "model.layers.0.mlp.experts.down_proj"
Tensors = dict[str, torch.Tensor]


def _packed(change: Callable[[Tensors], object] | None = None, method: Any = "fp8", **stated: Any) -> Spoil:
    """The model in FP8, with other tensors, and other words of how it is packed."""

    def pack(found: Tensors) -> None:
        for name in [name for name in found if name.endswith("_proj.weight")]:
            found[name], found[f"{name}_scale_inv"] = packed.packed_fp8(found[name], packed.BLOCK)
        if change is not None:
            change(found)

    def spoil(place: Place) -> None:
        packed.rewrite(place.model, pack)
        packed.state_packing(place.model, quant_method=method, **{"weight_block_size": list(packed.BLOCK), **stated})

    return spoil


def _experts(change: Callable[[Tensors], object]) -> Spoil:
    """The model with experts in MXFP4, which it has not, beside its own weights."""

    def add(found: Tensors) -> None:
        blocks, scales = packed.packed_mxfp4(torch.ones(4, 64, 32))
        found |= {f"{_EXPERTS}_blocks": blocks, f"{_EXPERTS}_scales": scales}
        change(found)

    def spoil(place: Place) -> None:
        packed.rewrite(place.model, add)
        packed.state_packing(place.model, quant_method="mxfp4")

    return spoil


def packed_cases() -> list[Case]:
    tensors: list[tuple[str, Callable[[Tensors], object], str]] = [
        ("lacks_scale", lambda f: f.pop(_SCALE), f"no file holds its scales ({_SCALE})"),
        ("scale_turned", lambda f: f.update({_SCALE: f[_SCALE].T}), f"{_SCALE} [4, 8] in F32 cannot be"),
        ("scale_empty", lambda f: f.update({_SCALE: torch.zeros(0, 0)}), f"{_SCALE} [0, 0] in F32 cannot be"),
        ("scale_whole", lambda f: f.update({_SCALE: f[_SCALE].long()}), f"{_SCALE} [8, 4] in I64 cannot be"),
        ("nan", lambda f: f[_WEIGHT].view(torch.uint8).fill_(0xFF), f"tensor {_WEIGHT} of the checkpoint holds"),
        ("wide", lambda f: f.update({_WEIGHT: f[_WEIGHT].repeat(1, 2)}), f"{_SCALE} [8, 4] in F32 cannot be"),
        ("flat", lambda f: f.update({_WEIGHT: f[_WEIGHT].view(-1)}), f"scales of {_WEIGHT} [1024] in F8_E4M3"),
        ("norm", lambda f: f.update({"model.norm.weight_scale_inv": torch.ones(1)}), "model.norm.weight [32]"),
    ]  # fmt: skip
    sizes: list[Any] = ["x", {}, [4, 0], [4, 1.5]]
    experts: list[tuple[str, Callable[[Tensors], object], str]] = [
        ("lacks_scale", lambda f: f.pop(f"{_EXPERTS}_scales"), f"no file holds its scales ({_EXPERTS}_scales)"),
        (
            "scale_cut",
            lambda f: f.update({f"{_EXPERTS}_scales": torch.zeros(4, 31, 2).byte()}),
            "cannot be the",
        ),
        ("flat", lambda f: f.update({f"{_EXPERTS}_blocks": torch.zeros(16).byte()}), "cannot be the scales of"),
        ("other_dtype", lambda f: f.update({f"{_EXPERTS}_blocks": torch.zeros(4, 32, 2, 16)}), "in F32"),
    ]
    return [
        *(Case(f"fp8_{name}", _packed(change), said) for name, change, said in tensors),
        *(
            Case(f"fp8_block_size_{number}", _packed(weight_block_size=size), "expected two whole numbers from 1 on")
            for number, size in enumerate(sizes)
        ),
        Case("fp8_not_said", _packed(method=["fp8"]), "is quantised with"),
        *(Case(f"mxfp4_{name}", _experts(change), said) for name, change, said in experts),
    ]
