"""A CUDA device that is none: what a run does on a GPU, checked on a machine without one.

    python -m tests.pretend_cuda <model> [key=value ...]        # as heretic-ds, on the pretended device

Its tensors say that they are on ``cuda:0`` and compute on the CPU. What CUDA refuses is refused: operations on tensors
of several devices, and a host that waits for the device where ``torch.cuda.set_sync_debug_mode("error")`` forbids it.
Graphs are those of :mod:`tests.recorded_graphs`. Kernels, streams, memory and speed are not pretended.

PyTorch built without CUDA has no notion of a current CUDA device; a few lines of C++ give it one, for the whole
process. That is why this runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo import trace_rules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from tests.injection_emulator import InferenceOp
from tests.recorded_graphs import RecordedGraph

DEVICE = torch.device("cuda", 0)
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten.copy.default}
_BY_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
"""Which take indices of the CPU for tensors of a device, and wait until they are copied."""
_NEVER_MIXED = {_aten.index_select.default, _aten.gather.default, _aten.embedding.default}
"""Which take not even a single number of another device."""
_WAITING = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default,
    _aten.repeat_interleave.Tensor, _aten._unique2.default, _aten.unique_consecutive.default, _aten.bincount.default,
}  # fmt: skip


class OnDevice(Tensor):
    """A tensor that says it is on the device; ``held`` is the one of the CPU behind it."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        if held.device.type != "cpu":
            raise ValueError(f"a tensor of {held.device} cannot stand behind one of {DEVICE}")
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        _wait("tolist")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def storage(self) -> Any:
        return self.held.storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


class _Everywhere(TorchDispatchMode):
    """Operations without a tensor of the device, too: some of them make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: refused where CUDA would, done on the CPU, its outputs on the device where they belong."""
    if _is_made_of_others(func):
        with _Everywhere():  # inference mode hands over what other modes take apart
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
    tensors: list[Tensor] = []
    _each(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, [*args, *kwargs.values()])
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    to_device = _goes_to_device(func, args, kwargs, bool(ours))
    kwargs.pop("pin_memory", None)
    if not ours and not to_device:
        return func(*args, **kwargs)
    if ours and others and func not in _COPIES:
        _refuse_mixed(func, args, ours, others)
    if (ours and func in _WAITING) or _crosses(func, args, kwargs, others, to_device):
        _wait(str(func))
    kwargs = {name: _each(_held, value) for name, value in kwargs.items()}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    args = [_each(_held, value) for value in args]
    if func is _aten.histc.default:  # counts whole numbers on CUDA alone
        args[0] = args[0].float()
    given = {id(_held(tensor)): tensor for tensor in tensors}
    return _each(lambda leaf: _given_back(leaf, given, to_device), func(*args, **kwargs))


@functools.cache
def _is_made_of_others(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """What a function makes of a value, or of all in a list of them, which is as deep as operators' arguments are."""
    return type(value)(_each(function, one) for one in value) if type(value) in (list, tuple) else function(value)


def _refuse_mixed(func: Any, args: Any, ours: list[OnDevice], others: list[Tensor]) -> None:
    if func in _BY_INDEX and isinstance(args[0], OnDevice):
        values = args[2:3]
        mixed = any(not isinstance(value, OnDevice) and value.dim() for value in values)
    else:
        numbers_alone = all(tensor.dim() == 0 for tensor in others)
        mixed = func in _NEVER_MIXED or func in _BY_INDEX or not numbers_alone
    if mixed:
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in (*ours, *others)]
        raise RuntimeError(f"expected all tensors to be on the same device: {func} of {shapes}")


def _goes_to_device(func: Any, args: Any, kwargs: dict[str, Any], ours: bool) -> bool:
    if func in _COPIES:
        return isinstance(args[0], OnDevice)
    wanted = kwargs.get("device")
    return ours if wanted is None else torch.device(wanted).type == DEVICE.type


def _crosses(func: Any, args: Any, kwargs: dict[str, Any], others: list[Tensor], to_device: bool) -> bool:
    """Whether the host waits for a copy between it and the device, or for a number of elements."""
    if func in _BY_INDEX and isinstance(args[0], OnDevice):
        return any(i is not None and (i.dtype == torch.bool or not isinstance(i, OnDevice)) for i in args[1])
    if func in _COPIES:
        return bool(others) and not (len(args) > 2 and args[2])
    if func is not _aten._to_copy.default:
        return False
    return isinstance(args[0], OnDevice) is not to_device and not kwargs.get("non_blocking")


def _wait(operation: str) -> None:
    if torch.cuda.get_sync_debug_mode() == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {operation}")


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnDevice) else leaf


def _given_back(leaf: Any, given: dict[int, Tensor], to_device: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) in given or not to_device:
        return given.get(id(leaf), leaf)
    with torch.inference_mode(False):  # a wrapper made in it could not stand for a parameter
        return OnDevice(leaf)


def move(module: nn.Module) -> nn.Module:
    """A module with its parameters and buffers on the device; tied ones stay tied."""
    moved: dict[int, Any] = {}
    for tensors in (kind for part in module.modules() for kind in (part._parameters, part._buffers)):
        for name, tensor in tensors.items():
            if tensor is None or isinstance(tensor, OnDevice):
                continue
            if id(tensor) not in moved:
                wrapped = OnDevice(tensor.data)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(wrapped, requires_grad=False) if is_parameter else wrapped
            tensors[name] = moved[id(tensor)]
    return module


class _Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    wait_stream = synchronize = record


class _CudaGraph(RecordedGraph):
    captured = replayed = 0

    @staticmethod
    @contextlib.contextmanager
    def capture(graph: _CudaGraph, **_: Any) -> Iterator[None]:
        _CudaGraph.captured += 1
        with graph.recording():
            yield

    def replay(self) -> None:
        _CudaGraph.replayed += 1
        super().replay()

    def pool(self) -> tuple[int, int]:
        return 0, 0


def _cuda() -> dict[str, Any]:
    """What a run asks of ``torch.cuda``."""
    mode: list[Any] = [0]
    stream = _Stream()
    nothing, no_bytes = (lambda *_, **__: None), (lambda *_, **__: 0)
    aside = {name: (lambda *_, **__: contextlib.nullcontext()) for name in ("device", "stream")}
    return aside | {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing,
        "get_device_name": lambda *_: "pretended", "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda **_: True, "init": nothing, "_lazy_init": nothing, "synchronize": nothing,
        "memory_allocated": no_bytes, "memory_reserved": no_bytes, "max_memory_allocated": no_bytes,
        "reset_peak_memory_stats": nothing, "empty_cache": nothing, "mem_get_info": lambda *_: (8 << 30, 16 << 30),
        "Stream": _Stream, "Event": _Stream, "current_stream": lambda *_: stream,
        "CUDAGraph": _CudaGraph, "graph": _CudaGraph.capture, "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": lambda wanted: mode.__setitem__(0, wanted),
    }  # fmt: skip


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Within it, PyTorch has one CUDA device."""
    accelerator = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device_index": lambda: 0,
        "current_accelerator": lambda *_: torch.device("cuda"),
    }  # fmt: skip
    to = nn.Module.to

    def module_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        is_device = args and not isinstance(args[0], torch.dtype | Tensor)
        return move(module) if is_device and torch.device(args[0]).type == DEVICE.type else to(module, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        version = {"cuda": "12.8"}
        for owner, names in (
            (torch.version, version),
            (torch.cuda, _cuda()),
            (torch.accelerator, accelerator),
            (nn.Module, {"to": module_to}),
        ):
            for name, stand_in in names.items():
                stack.enter_context(mock.patch.object(owner, name, stand_in))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) moves what it made of numbers
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_Everywhere())
        yield


def give_devices() -> None:
    """Lets this process have a current CUDA device."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        subprocess.run(
            [get_cxx_compiler(), "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library), *paths, "-lc10"],
            check=True,
        )
        torch.ops.load_library(library)
    trace_rules.get_torch_obj_rule_map()  # which looks at torch.cuda, once, and would not know what stands in for it


def _give_kernels() -> None:
    """Has the kernels of :mod:`tests.injection_emulator` ready as DeepSpeed's, their working memory on the device."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    class Kernels(InferenceOp):
        def __getattr__(self, name: str) -> Any:
            kernel = super().__getattr__(name)

            def on_device(*arguments: Any) -> Any:
                with DEVICE:
                    return kernel(*arguments)

            return on_device

    OpBuilder._loaded_ops["transformer_inference"] = Kernels(pairs_as_in_half=True)


def main(words: list[str]) -> int:
    from heretic_ds import cli

    os.environ |= {"HF_DEACTIVATE_ASYNC_LOAD": "1", "DS_ACCELERATOR": "cuda"}  # a mode is its own thread's
    give_devices()
    with pretended():
        if "evaluate=kernel_inject" in words:
            _give_kernels()
        status = cli.main(words)
    print(f"{_CudaGraph.captured} graphs captured, {_CudaGraph.replayed} times replayed")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
