"""Building a model without memory for its weights, but with its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in this context get their parameters on the meta device and their buffers where they belong.

    Buffers that no checkpoint holds, such as rotary frequencies, are computed by constructors alone: a model built
    wholly on the meta device has lost them, and filling it with memory leaves them at random values without a word.
    Each parameter exists for the moment between its allocation and its registration, untouched.
    """
    original = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
