"""What a CUDA graph does, on any device: operations are recorded with the memory they work on, and done again on it.

No Python of the model runs again, and nothing but that memory is read: a buffer that was exchanged for another, a
number that Python counted up, or a shape that changed shows as it would with a real graph. Operations that a device
cannot do while it is capturing, because the host would wait for it or give it memory of its own, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_REFUSED = (
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::unique",
    "aten::masked_select", "aten::repeat_interleave.Tensor", "aten::lift_fresh", "transformers::grouped_mm_fallback",
)  # fmt: skip
"""Of these, `lift_fresh` is how a tensor is made of Python numbers."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        by_mask = name == "aten::index" and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if any(refused in (name, f"{name}.{func._overloadname}") for refused in _REFUSED) or by_mask:
            _refuse(name)
        output = func(*args, **kwargs)
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and _memory(leaf) not in given]
        if made or func._schema.is_mutable:  # else a view, which sees what its memory holds
            self.operations.append((func, args, kwargs, made))
        return output


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class RecordedGraph:
    """What was done within :meth:`recording`."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        recording = _Recording()
        with recording, mock.patch.object(Tensor, "tolist", lambda tensor: _refuse("tolist")):  # no operation
            yield
        self._operations = recording.operations
        for _, _, _, made in self._operations:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))  # what is not computed anew is seen

    def replay(self) -> None:
        for func, args, kwargs, made in self._operations:
            output = func(*args, **kwargs)
            for old, new in zip(made, [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], strict=False):
                old.copy_(new)


class Recorder:
    """Makes recorded graphs, and counts."""

    def __init__(self, failures: tuple[Exception, ...] = ()) -> None:
        self.made = self.replayed = 0
        self.failures = list(failures)

    def __call__(self, step: Callable[[], None]) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        self.made += 1
        graph, recorder = RecordedGraph(), self
        with graph.recording():
            step()

        class Counted:
            def replay(self) -> None:
                recorder.replayed += 1
                graph.replay()

        return Counted()
