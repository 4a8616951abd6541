"""Building a model without memory for its weights, but with its buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
_LARGE = 2**24
"""Numbers from which on a new tensor is never given memory: no buffer is that large, and zeros are written out."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built in this context get their parameters on the meta device and their buffers where they belong.

    Buffers that no checkpoint holds, such as rotary frequencies, are computed by constructors alone: a model built
    wholly on the meta device has lost them, and filling it with memory leaves them at random values without a word.
    A small parameter exists for the moment between its allocation and its registration.
    """
    original = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]  # for as long as the context lasts
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class _LargeOnMeta(TorchFunctionMode):
    """Lets large new tensors have no memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None and _numbers(args, kwargs) >= _LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many numbers a factory is asked for."""
    size = kwargs["size"] if "size" in kwargs else args[0] if args and not isinstance(args[0], int) else args
    return math.prod(size)
