"""What each rank of the tests of ``zero3`` runs: capture and answers of every family, beside those of ``replicated``.

    python -m tests.distributed.zero3_ranks FOLDER PART

Rank r leaves FOLDER/<r>.pt: a dictionary of results by family.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heretic_ds.cli import compose
from heretic_ds.engines import replicated, zero3
from heretic_ds.engines.release import Originals
from heretic_ds.errors import UserError
from heretic_ds.job import Job
from heretic_ds.world import ALONE, World
from tests import families

LENGTHS = (9, 4, 6, 11, 5, 3, 8)
NEW_TOKENS = 12


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    low, high = len(families.SPECIAL_TOKENS), len(families.VOCABULARY) - 5
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in LENGTHS[:count]]


def job_for(model: Path, world: World, *overrides: str) -> Job:
    settings = compose(
        [str(model), "model.dtype=float32", f"generation.max_new_tokens={NEW_TOKENS}", "capture=zero3", *overrides]
    )
    return Job.check(settings, world, with_prompts=False)


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(field)
