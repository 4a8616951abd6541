"""Giving back what an engine took of its process: functions that a library put its own in the place of."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_OWNERS: tuple[Any, ...] = (torch, torch.nn.functional, torch.Tensor, nn.Module, nn.Linear, nn.Embedding, dist)
"""Where DeepSpeed puts functions of its own: the constructors of tensors, ``functional.linear``, hooks of modules."""


class Originals:
    """The functions of PyTorch as they are when this is made, to be put back after a library replaced some."""

    def __init__(self, owners: Sequence[Any] = _OWNERS) -> None:
        self._functions = [(owner, name, value) for owner in owners for name, value in _functions(owner).items()]

    def replaced(self) -> list[str]:
        """Names of the functions that are others now."""
        return [f"{_name(owner)}.{name}" for owner, name, _ in self._changes()]

    def restore(self) -> list[str]:
        """Put back every function that was replaced, and return their names."""
        names = self.replaced()
        for owner, name, value in self._changes():
            setattr(owner, name, value)
        return names

    def _changes(self) -> list[tuple[Any, str, Any]]:
        return [(owner, name, value) for owner, name, value in self._functions if vars(owner).get(name) is not value]


def _functions(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if _is_function(value)}


def _is_function(value: Any) -> bool:
    kind = type(value)  # asked of the value, some deprecated names warn
    return issubclass(kind, staticmethod | classmethod) or (callable(value) and not issubclass(kind, type | ModuleType))


def _name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
