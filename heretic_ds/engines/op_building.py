"""Compiled parts of DeepSpeed, built at first use, without waiting for ever for a build that was ended."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import get_default_build_root

from heretic_ds.engines.deepspeed_start import quietly

log = logging.getLogger(__name__)

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
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == path:
                return True
        except OSError:  # closed, ended, or another user's
            continue
    return False


def _last_change(folder: Path) -> float:
    changes = [folder.stat().st_mtime]
    for file in folder.iterdir():
        try:
            changes.append(file.stat().st_mtime)
        except FileNotFoundError:  # a build that goes on renames and deletes
            continue
    return max(changes)
