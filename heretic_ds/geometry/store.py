"""Residuals of all prompts outside of memory: a file without a name, gone with whoever opened it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from heretic_ds.errors import UserError


class ResidualStore:
    """Residuals [L+1, N, D] in float32, filled prompt by prompt in any order and read layer by layer.

    They take 4 (L+1) N D bytes of disk while the store lives, and of memory no more than what is in hand: the kernel
    takes the pages back. L blocks, N prompts, D width.
    """

    def __init__(self, folder: Path, entries: int, prompts: int, width: int) -> None:
        """``folder`` is where the file lies. Raises UserError where there is no room for it."""
        size = entries * prompts * width
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".residuals.", suffix=".tmp") as file:
            try:
                # At once: a page that the disk has no room for ends the process when it is written to.
                _reserve(file.fileno(), folder, size * torch.float32.itemsize)
            except OSError as error:
                raise UserError(
                    f"{folder} has no room for the residuals of {prompts} prompts, "
                    f"{size * torch.float32.itemsize / 1e9:.1f} GB for the time of the measurement ({error.strerror}); "
                    "set run.dir to a folder on another disk, or use fewer prompts"
                ) from error
            flat = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32)
        self._residual_LND = flat.view(entries, prompts, width)
        self._known_N = torch.zeros(prompts, dtype=torch.bool)

    @property
    def entries(self) -> int:
        """Entries of the stream, L+1."""
        return self._residual_LND.shape[0]

    def put(self, places: Sequence[int], residual_LBD: Tensor) -> None:
        """Keep the residuals [L+1, B, D] of the prompts at these places."""
        self._residual_LND[:, list(places)] = residual_LBD
        self._known_N[list(places)] = True

    def layer(self, entry: int) -> Tensor:
        """Residuals [N, D] of all prompts at one entry of the stream, float64. Raises ValueError while some lack."""
        if not self._known_N.all():
            raise ValueError(f"{int((~self._known_N).sum())} prompts have no residuals yet")
        return self._residual_LND[entry].double()


def _reserve(descriptor: int, folder: Path, size: int) -> None:
    """Make an empty file so many bytes long. Raises OSError where the disk has no room for them."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    # As on macOS: what is free may be taken by others before it is written to.
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, size)
