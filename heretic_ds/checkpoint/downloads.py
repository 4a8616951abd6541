"""Files of a model on the hub, fetched into its cache, with the bytes counted for whoever shows progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm

from heretic_ds import progress


def fetched(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a hub model in which the files of these patterns are. Raises what the hub's client raises."""
    with progress.work("files", unit="bytes") as work:

        class Counter(_Counter):
            counted = work

        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns), tqdm_class=Counter)
    return Path(found)


class _Counter(tqdm):
    """Stands where the hub's client would show bars: of those that count bytes, that of bytes on disk knows in the end
    how many there are to be."""

    counted: progress.Work

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})
        self._on_disk = str(options.get("desc", "")).startswith("Reconstruct")

    def update(self, n: float | None = 1) -> bool | None:
        """So many bytes, or files, more."""
        if self._on_disk:
            self.counted.advance(n or 0)
            self.counted.total = self.total or None
        return super().update(n)
