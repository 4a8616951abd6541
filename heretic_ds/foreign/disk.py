"""Writing to disks that may be full, or may take nothing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heretic_ds.errors import UserError
from heretic_ds.foreign.ulimits import limit_reached

FULL = (errno.ENOSPC, errno.EDQUOT)
_BLOCK = 4096
"""Bytes that the least addition to a file takes."""
_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""What :func:`write_atomically` calls a file until it is whole."""


@contextmanager
def writing(folder: Path, setting: str, size: int = _BLOCK) -> Iterator[None]:
    """While open, what the system refuses to write to a folder is a UserError that names the folder.

    ``size`` is how many bytes are written, as far as it is known; where the disk is full it says how many are missing.
    ``setting`` is what the user may set to another folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = _free_bytes(folder)
            raise UserError(
                f"the disk of {folder} is full: {size} bytes are to be written, {max(size - free, 1)} more than are "
                f"free; free some space and run the same command again, or set {setting}"
            ) from error
        if limit := limit_reached(error):
            raise UserError(f"{folder} cannot be written: {limit}") from error
        why = (
            "the largest file allowed here (ulimit -f) is reached"
            if error.errno == errno.EFBIG
            else error.strerror or error
        )
        raise UserError(f"{folder} cannot be written ({why}); set {setting} to another folder") from error


def usual_mode() -> int:
    """The mode of a new file by this process's mask: libraries make files that only their owner may read."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _free_bytes(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def write_atomically(path: Path, content: bytes | str, setting: str = "run.dir") -> None:
    """Replace ``path`` in one step: a kill or a power cut leaves the old content or the new, never a part.

    Raises UserError where it cannot be written; ``setting`` is what names the folder.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path.parent, setting, len(data)):
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, usual_mode())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, setting: str) -> None:
    """Remove parts of files that kills left: :func:`write_atomically` had not yet put them in the old ones' places."""
    with writing(folder, setting):
        for file in folder.glob(".*.tmp"):
            if _UNFINISHED.fullmatch(file.name) and file.is_file():
                file.unlink()
