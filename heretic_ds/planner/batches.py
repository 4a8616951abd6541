"""Batch sizes that were measured for a model on a machine: kept for later runs beside what was measured of the machine.

They are used again where all that they depend on is the same: the shapes of the model and how it lies on which devices,
the lengths of the prompts and answers, the versions of the libraries; and where twice the memory that they take is
free. On CUDA, where a pass that runs out of memory is tried again with fewer rows, what they take may not have been
asked (0 bytes), and they are used without asking.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from heretic_ds.checkpoint import bnb
from heretic_ds.errors import UserError
from heretic_ds.export.manifest import package_versions
from heretic_ds.foreign.reading import check_shape, read_json
from heretic_ds.job import Job
from heretic_ds.memory import free_bytes
from heretic_ds.placements import Engine, Placement
from heretic_ds.planner.calibrate import cache_folder, keep_in_cache, this_machine
from heretic_ds.runner.sizing import PHASES, SAFE_SHARE

log = logging.getLogger(__name__)

_SHAPE = {"circumstances": dict, "phases": {str: {"rows": int, "bytes": int}}}


class KeptBatches:
    """The batch sizes of one engine, in a file of the user's cache folder. Every rank has one; the one that decides
    reads and writes."""

    def __init__(self, job: Job, engine: Engine, layout: tuple[type[Placement], Placement.Options]) -> None:
        self._job, self._engine = job, engine
        self._circumstances = _circumstances(job, engine, layout)
        digest = hashlib.sha256(json.dumps(self._circumstances, sort_keys=True).encode()).hexdigest()[:16]
        self.file = cache_folder() / f"batches-{digest}.json"
        self._phases: dict[str, dict[str, int]] = {}
        """What the file holds."""

    def used(self) -> KeptBatches:
        """Give the engine the sizes that were measured before and whose memory is there, unless the user gives one.
        Every rank takes part."""
        if self._job.settings.generation.batch_size:
            return self
        world, device = self._job.world, self._job.opened.device
        self._phases = world.decide(lambda: _read(self.file))
        free = world.gather(free_bytes(device))
        for phase, kept in self._phases.items():
            if kept["rows"] > 0 and kept["bytes"] <= SAFE_SHARE * min(free):
                self._engine.batch_sizes[phase] = kept["rows"]
                self._engine.batch_bytes[phase] = kept["bytes"]
                log.info("batch size for %s: %d rows (as measured before)", PHASES.get(phase, phase), kept["rows"])
        return self

    def prefer(self, sizes: Mapping[str, int]) -> None:
        """Give the engine the sizes of an earlier run of the same folder instead."""
        for phase, rows in sizes.items():
            if self._engine.batch_sizes.get(phase) != rows:
                self._engine.batch_bytes.pop(phase, None)  # those of a batch of another size
            self._engine.batch_sizes[phase] = rows

    def keep(self) -> None:
        """Write what the engine has measured where that is new. A size that was larger than there is memory for today,
        or was halved today, stays for other days."""
        sizes, phases = self._engine.batch_sizes, dict(self._phases)
        for phase, taken in self._engine.batch_bytes.items():
            before = phases.get(phase, {"rows": 0, "bytes": 0})
            halved = not taken and sizes.get(phase, 0) < before["rows"]
            if phase in sizes and taken >= before["bytes"] and not halved:
                phases[phase] = {"rows": sizes[phase], "bytes": taken}
        if phases != self._phases:
            self._phases = phases
            keep_in_cache(self.file, {"circumstances": self._circumstances, "phases": phases})


def _read(file: Path) -> dict[str, dict[str, int]]:
    """The sizes in a file; none where there is no file, or none that this wrote."""
    if not os.path.exists(file):  # False where the folder may not be looked into
        return {}
    try:
        content = read_json(file)
        check_shape(content, _SHAPE, str(file), "remove it")
    except UserError as error:
        log.warning("%s: batch sizes are measured anew", error)
        return {}
    found = {phase: kept for phase, kept in content.get("phases", {}).items() if {"rows", "bytes"} <= kept.keys()}
    return dict(found)


def _circumstances(job: Job, engine: Engine, layout: tuple[type[Placement], Placement.Options]) -> dict[str, Any]:
    """All that batch sizes depend on. Every rank may ask; the one that decides uses the answer."""
    settings, device = job.settings, job.opened.device
    generation = settings.generation
    return {
        "machine": this_machine(device),
        "device_memory": torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0,
        "threads": torch.get_num_threads(),
        "ranks": [job.world.size, os.environ.get("LOCAL_WORLD_SIZE", job.world.size), engine.degree],
        "placement": [layout[0].name, asdict(layout[1])],
        "versions": package_versions(("deepspeed",)),
        "model": _shapes(job),
        "dtype": f"{engine.dtype} {bnb.in_words(settings.model.quantization)}".strip(),
        "answers": [generation.max_new_tokens, generation.prefill_reuse, generation.cuda_graphs],
        "trials_per_pass": str(settings.search.trials_per_pass),
        "row_norm": settings.ablation.row_norm,
        "prompts": {name: _lengths(texts) for name, texts in job.texts.items()},
        "format": [job.chat.added_characters, job.template_digest()],
    }


def _shapes(job: Job) -> str:
    """A digest of the names, shapes and dtypes of a model's tensors, and of its configuration."""
    opened = job.opened
    told = {
        "config": opened.config.to_json_string(use_diff=False),
        "tensors": sorted((name, info.shape, info.dtype) for name, info in opened.headers.items()),
    }
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]


def _lengths(texts: Sequence[str]) -> Mapping[str, int]:
    lengths = [len(text) for text in texts]
    return {"count": len(lengths), "longest": max(lengths, default=0), "all": sum(lengths)}
