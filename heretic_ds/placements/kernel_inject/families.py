"""Which models the injected kernels compute rightly: knowledge as data, and the one function that applies it.

Whatever is not on the list is refused. The limits were read off the kernels' sources; where they are passed, the
kernels do not stop but compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from heretic_ds.errors import UserError

_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""The kernels' gelu is the tanh approximation; plain ``gelu`` is not."""
_INSTEAD = "set evaluate=tensor_parallel"
_WARP, _LEAST_THREADS = 32, 4
"""Threads that may share one head where its two halves are rotated against each other."""
_BLOCK = 1024
"""Most threads of a CUDA block."""
_NARROW, _WIDEST, _NORMED_AT_ONCE = 128, 16384, 16
"""Widest row of which a block of threads norms several, and widest of all; how many numbers a thread takes at once of
those that are not narrow."""


@dataclass(frozen=True)
class Family:
    """What there is to know of one family of models."""

    policy: str
    """Name of the entry of :data:`heretic_ds.placements.kernel_inject.policies.POLICIES`."""
    requires: Mapping[str, tuple[Any, ...]]
    """Values that a field of the configuration may have, for it to be what the kernels compute."""
    returns_pair: bool = False
    """Whether the model's loop takes ``(hidden, None)`` from a block, not the hidden state alone."""
    rotation: str | None = None
    """How positions turn queries and keys: "halves", "pairs", or None for learned positions."""
    dtypes: frozenset[torch.dtype] = field(
        default_factory=lambda: frozenset({torch.float32, torch.bfloat16, torch.float16})
    )

    @property
    def gated(self) -> bool:
        """Whether the MLP's first product is a gate and a value, and norms are RMS norms."""
        return self.policy == "gated"


_GATED = {"hidden_act": ("silu",)}

FAMILIES: dict[str, Family] = {
    "llama": Family("gated", _GATED | {"attention_bias": (False,), "mlp_bias": (False,)}, rotation="halves"),
    "mistral": Family("gated", _GATED, rotation="halves"),
    "qwen2": Family("gated", _GATED, rotation="halves"),
    "gpt2": Family(
        "gpt2",
        {
            "activation_function": _TANH_GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "opt": Family(
        "opt",
        {
            "activation_function": ("relu", "gelu_new"),
            "do_layer_norm_before": (True,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
        },
    ),
    # In float32 the kernel turns the second number of a pair by the first one's new value.
    "gptj": Family(
        "gptj",
        {"activation_function": _TANH_GELU},
        returns_pair=True,
        rotation="pairs",
        dtypes=frozenset({torch.bfloat16, torch.float16}),
    ),
    "gpt_neo": Family("gpt_neo", {"activation_function": _TANH_GELU}, returns_pair=True),
    "gpt_neox": Family(
        "gpt_neox",
        {"hidden_act": _TANH_GELU, "use_parallel_residual": (True,), "attention_bias": (True,)},
        rotation="halves",
    ),
}
"""By ``model_type``."""


def find_family(config: PreTrainedConfig, dtype: torch.dtype, name: str) -> Family:
    """The family of a model that the kernels compute rightly in ``dtype``.

    Raises UserError, one line, for any other model; ``name`` is what the user calls it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"evaluate=kernel_inject serves {', '.join(FAMILIES)}, and {name} is a {config.model_type}; {_INSTEAD}"
        )
    problem = next(_problems(family, config, dtype), None)
    if problem is not None:
        raise UserError(f"evaluate=kernel_inject cannot serve {name}: {problem}; {_INSTEAD}")
    return family


def _problems(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> Iterator[str]:
    """All that keeps the kernels from computing what the model computes."""
    if dtype not in family.dtypes:
        yield f"its kernels are wrong for {config.model_type} in {str(dtype).removeprefix('torch.')}"
    for name, values in family.requires.items():
        value = getattr(config, name, values[0])
        if value not in values:
            yield f"its {name} is {value!r}, and the kernels compute {' or '.join(repr(v) for v in values)}"
    yield from _shape_problems(family, config, dtype)


def _shape_problems(family: Family, config: PreTrainedConfig, dtype: torch.dtype) -> Iterator[str]:
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    if head * heads != width:
        yield f"its {heads} heads of {head} do not make up its width of {width}"
    vector = 16 // dtype.itemsize
    if head % vector or (inner_width(config) % vector):
        yield f"its head size {head} and inner width {inner_width(config)} have to be multiples of {vector}"
    if dtype.itemsize == 2 and width // vector > _BLOCK:
        yield f"its width {width} exceeds {vector * _BLOCK}"
    if not _norms_fit(width, vector):
        yield f"the kernels do not norm rows of {width} in {str(dtype).removeprefix('torch.')}"
    if family.rotation is not None:
        yield from _rotation_problems(family.rotation, config, head, dtype)


def _norms_fit(width: int, vector: int) -> bool:
    """Whether norms are computed: up to 128 wide by groups of 1 to 16 threads, for which alone there are kernels; wider
    ones by whole warps, since sums are made over all threads of one, up to the widest that there is a kernel for."""
    narrow = width <= _NARROW
    each = vector if narrow else _NORMED_AT_ONCE
    threads = 1 << (math.ceil(width / each) - 1).bit_length()
    return threads <= _WARP // 2 if narrow else threads >= _WARP and width <= _WIDEST


def _rotation_problems(rotation: str, config: PreTrainedConfig, head: int, dtype: torch.dtype) -> Iterator[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        yield f"its rotary positions are of type {kind!r}, and the kernels know unscaled ones only"
    turned = rotary_width(config, head)
    if not turned:
        yield "it does not say how many numbers of a head are rotated"
    elif rotation == "pairs" and turned % (16 // dtype.itemsize):
        yield f"{turned} rotated numbers a head are no multiple of {16 // dtype.itemsize}"
    elif rotation == "halves" and not _halves_fit(head, turned, dtype.itemsize):
        yield f"the kernels do not rotate {turned} numbers of a head of {head}"


def _halves_fit(head: int, turned: int, itemsize: int) -> bool:
    """Whether one group of threads, a power of two that covers exactly one head, holds both halves of what is turned.

    Threads past the end of a head would write back a neighbour's numbers as they were before it was rotated.
    """
    for alignment in (16, 8, 4):
        each = alignment // itemsize
        if each and (turned // 2) % each == 0:
            return head & (head - 1) == 0 and _LEAST_THREADS <= head // each <= _WARP
    return False


def rotary_width(config: PreTrainedConfig, head: int) -> int:
    """How many numbers of each head are rotated."""
    if hasattr(config, "rotary_dim"):
        return int(config.rotary_dim or 0)
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head * rope.get("partial_rotary_factor", 1.0))


def inner_width(config: PreTrainedConfig) -> int:
    """The width inside the MLP, under whichever name the family has it."""
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)


def most_tokens(config: PreTrainedConfig) -> int | None:
    """Longest sequence, answer included, in which a window of attention hides nothing; None where there is none.

    The kernels know no window, but for GPT-Neo's, which is one token short while decoding.
    """
    local = getattr(config, "attention_layers", None)
    if local is not None:
        return int(config.window_size) - 1 if "local" in local else None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def refuse_long(tokens: int, limit: int | None) -> None:
    """Raise UserError where a sequence of ``tokens``, answer included, is longer than the attention's window allows."""
    if limit is not None and tokens > limit:
        raise UserError(
            f"evaluate=kernel_inject serves this model up to {limit} tokens, its window of attention, and a prompt "
            f"with its answer takes {tokens}; lower generation.max_new_tokens, or {_INSTEAD}"
        )
