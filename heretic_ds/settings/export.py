"""The group ``export`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from heretic_ds.settings.fields import within

SIZE = r"(?i)\d+(\.\d+)? ?[KMGT]B"
"""What ``max_shard_size`` has to match."""


@dataclass
class ExportSettings:
    """What is written for the chosen trial."""

    dir: Optional[str] = None
    """Folder of the exported model; null: ``<run.dir>/model``."""
    trial: Optional[int] = within(None, ge=0)
    """Trial to export; null: the fewest refusals within ``max_kl``, ties to the lower KL."""
    max_kl: float = within(0.1, gt=0, lt=math.inf, words="a finite number above 0 (nats)")
    """Largest KL divergence (nats) a trial may have to be chosen."""
    overwrite: bool = False
    """Replace an existing, non-empty export folder."""
    max_shard_size: Optional[str] = None
    """Largest weight file, as in ``5GB``; null: 5GB, or the original's own files where ranks edit them one by one."""
    gguf: bool = False
    """Also convert the exported model to GGUF, by llama.cpp's ``convert_hf_to_gguf.py``."""
    format: str = within("model", choices=("model", "adapter", "both"))
    """``model`` (the whole edited model), ``adapter`` (a LoRA adapter for the original, in the files of ``peft``) or
    ``both`` (the model, with the adapter in its folder ``adapter``)."""
    repo: Optional[str] = None
    """Repository that ``task=upload`` writes to (``owner/name``); null: your own, ``<model>-abliterated``."""
    private: bool = True
    """Whether a repository that it makes is private."""
    adapter_rank: int = within(8, ge=1)
    """Rank of an adapter with ``ablation.row_norm=full``; with ``none`` and ``pre`` it is ``ablation.rank``, and
    exact."""
