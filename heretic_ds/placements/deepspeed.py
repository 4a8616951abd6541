"""DeepSpeed's habits, mended in one place: quiet imports, its start, what it patches, locks of its compiled parts."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from heretic_ds.errors import UserError
from heretic_ds.needs import check_deepspeed

log = logging.getLogger(__name__)


@contextmanager
def quietly(level: int = logging.INFO) -> Iterator[None]:
    """Without messages up to a level: DeepSpeed tries the compiler and logs every command to the root logger."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def settle_accelerator(device: torch.device) -> None:
    """Let DeepSpeed, which settles at its import on one kind of device, take this one where nobody has chosen."""
    if not _is_elsewhere(device):
        os.environ.setdefault("DS_ACCELERATOR", device.type)


def check_accelerator(device: torch.device, what: str) -> None:
    """Raise UserError where ``what`` needs a DeepSpeed that is missing, or settled on another kind of device."""
    check_deepspeed(what)
    if _is_elsewhere(device):
        return
    settle_accelerator(device)
    with quietly():
        from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise UserError(
            f"model.device={device.type}, but DeepSpeed runs on {get_accelerator().device_name()} here; "
            f"set DS_ACCELERATOR={device.type} in the environment, or model.device=auto"
        )


def _is_elsewhere(device: torch.device) -> bool:
    """Whether a device is one of another machine, for which a plan is made."""
    return device.type == "cuda" and not torch.cuda.is_available()


def start_deepspeed() -> None:
    """Let DeepSpeed use the processes' own group, or one of this process alone.

    On the CPU it would compile and use a sum through shared memory, which ignores the group it is asked to sum over; a
    process that is killed while it compiles leaves a lock behind, for which every later one waits for ever.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    with quietly():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # looks for all that could be compiled
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


_OWNERS: tuple[Any, ...] = (torch, torch.nn.functional, torch.Tensor, nn.Module, nn.Linear, nn.Embedding, dist)
"""Where DeepSpeed puts functions of its own: the constructors of tensors, ``functional.linear``, hooks of modules."""


def collectives_of_deepspeed() -> tuple[Any, ...]:
    """Objects in which DeepSpeed keeps PyTorch's collective functions."""
    from deepspeed.comm import comm

    return (comm.cdb,)


class Originals:
    """The functions of PyTorch as they are when this is made, to be put back after a library replaced some."""

    def __init__(self, owners: Sequence[Any] = _OWNERS) -> None:
        self._functions = [
            (owner, name, value) for owner in owners for name, value in vars(owner).items() if _is_function(value)
        ]

    def replaced(self) -> list[str]:
        """Names of the functions that are others now."""
        return [_name(owner, name) for owner, name, _ in self._changes()]

    def restore(self) -> list[str]:
        """Put back every function that was replaced, and return their names."""
        changes = self._changes()
        for owner, name, value in changes:
            setattr(owner, name, value)
        return [_name(owner, name) for owner, name, _ in changes]

    def _changes(self) -> list[tuple[Any, str, Any]]:
        return [(owner, name, value) for owner, name, value in self._functions if vars(owner).get(name) is not value]


def _is_function(value: Any) -> bool:
    kind = type(value)  # asked of the value, some deprecated names warn
    return issubclass(kind, staticmethod | classmethod) or (callable(value) and not issubclass(kind, type | ModuleType))


def _name(owner: Any, function: str) -> str:
    path = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
    return f"{path}.{function}"


_QUIET = 600.0
"""Seconds without a new file after which nobody builds there: no single file takes as long to compile."""


def load_op(builder: Any) -> Any:
    """The module that one of DeepSpeed's op builders makes. Raises what the builder does where it cannot."""
    if builder.name not in builder._loaded_ops:
        log.info("loading DeepSpeed's %s, whose first build takes some minutes", builder.name)
        wait_for_locks()
    with quietly():
        return builder.load(verbose=False)


def wait_for_locks(quiet: float = _QUIET) -> None:
    """Return when no build is going on that a killed process will never end.

    Whoever builds holds a file named ``lock`` open, and a killed process leaves it. A lock that some process here has
    open is waited for by torch itself; any other is another machine's, on a shared disk, or nobody's: the latter once
    nothing has changed in its folder for ``quiet`` seconds. It is removed then.
    """
    for lock in _locks():
        told = False
        while lock.exists() and not _is_open(lock):
            if time.time() - _last_change(lock.parent) > quiet:
                lock.unlink(missing_ok=True)
                log.warning("removed %s, which a build that was ended had left", lock)
                break
            if not told:
                log.warning(
                    "%s: no process of this machine builds there; waiting for another machine's, or until nothing has "
                    "changed there for %.0f s (delete that file if you know that nobody builds)",
                    lock,
                    quiet,
                )
                told = True
            time.sleep(1)


def _locks() -> Iterator[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    yield from root.glob("*/lock")
    yield from root.glob("*/*/lock")


def _is_open(file: Path) -> bool:
    """Whether a process of this machine has the file open, as far as this user can see."""
    path = str(file.resolve())
    opened = (process.info["open_files"] or () for process in psutil.process_iter(["open_files"]))
    return any(each.path == path for files in opened for each in files)


def _last_change(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:  # a build that goes on renames and deletes
        return time.time()
