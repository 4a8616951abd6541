"""What a run says before it loads anything: with which model, on what, from which prompts."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heretic_ds import __version__
from heretic_ds.checkpoint.fitness import dtype_name
from heretic_ds.foreign.text import printable
from heretic_ds.job import Job
from heretic_ds.memory import free_on_host, host_memory
from heretic_ds.progress import GREETED
from heretic_ds.prompts import KINDS, PARTS, TEST
from heretic_ds.report.console import is_live, say
from heretic_ds.settings import AUTO_TEST, PromptSource
from heretic_ds.stages.facts import held_in_words, model_title

log = logging.getLogger(__name__)

_GIB = 2**30
_ALIGNED = 80
"""Columns of a terminal from which on there is room for names in a column of their own."""


def start_facts(job: Job, folder: Path) -> dict[str, str]:
    """What to say of a run in ``folder``, by what it is about. Every rank takes part: each has a device to tell of."""
    opened, settings = job.opened, job.settings
    parameters = sum(math.prod(info.shape) for info in opened.headers.values())
    size = f"{_in_words(parameters)} parameters, " if parameters else ""
    dtypes = [dtype_name(dtype) for dtype in opened.dtypes]
    other = f", or {dtypes[1]} where that does not run" if len(dtypes) > 1 else ""
    facts = {
        "version": f"heretic-ds {__version__}",
        "model": f"{model_title(job)}: {size}{job.anatomy.summary()}",
        "dtype": held_in_words(job, f"{dtypes[0]} (model.dtype={settings.model.dtype}{other})"),
        "device": _devices(job.world.gather(_device(opened.device))),
        "run": f"{folder}, task={settings.task.name}",
    }
    for kind in KINDS:
        for part in PARTS:
            source = getattr(getattr(settings.prompts, kind), part)
            facts[f"{kind}.{part}"] = _prompts(source, len(job.texts[f"{kind}.{part}"]), job.rows[f"{kind}.{part}"])
        if settings.verify.final and settings.task.name in ("abliterate", "export"):
            facts[f"{kind}.{TEST}"] = _test_prompts(job, kind)
    return facts


def show_start(console: Console, facts: Mapping[str, str]) -> None:
    """Print them and log them, a line each; at a terminal that is wide enough aligned, and folded between words."""
    for name, fact in facts.items():  # the run's log begins with it, too
        log.info("%s: %s", name, fact, extra={"console": False})
    told = {name: fact for name, fact in facts.items() if name != "version"}
    if not os.environ.get(GREETED):
        say(console, facts["version"])
    if not is_live(console) or console.width < _ALIGNED:
        for name, fact in told.items():
            say(console, f"{name}: {fact}")
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, fact in told.items():
        table.add_row(Text(name), Text(printable(fact)))
    console.print(table)


def _prompts(source: PromptSource, count: int, rows: int) -> str:
    """``400 of 416 prompts of mlabonne/harmful_behaviors, split train, slice 0:400``."""
    how = [source.source]
    if not Path(source.source).suffix:
        how.append(f"split {source.split}")
    if source.slice is not None:
        how.append(f"slice {source.slice}")
    return f"{count} of {rows} prompts of {', '.join(how)}"


def _test_prompts(job: Job, kind: str) -> str:
    """``20 prompts behind those of eval and train``, or what stands in for them."""
    name, source = f"{kind}.{TEST}", getattr(job.settings.prompts, kind).test
    if name not in job.texts:
        return f"none, so final scores are on the eval prompts, which also choose the edit; prompts.{name} gives some"
    if source.source == AUTO_TEST:
        return f"{len(job.texts[name])} of {job.rows[name]} prompts behind those of eval and train"
    return _prompts(source, len(job.texts[name]), job.rows[name])


def _device(device: torch.device) -> str:
    """A device with its memory; cores and memory of the host are those of all ranks on it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    counted = f"{cores or os.cpu_count()} cores, {torch.get_num_threads()} used by a rank"
    return f"CPU: {counted}, {free_on_host() / _GIB:.1f} of {host_memory() / _GIB:.1f} GiB free"


def _devices(each: list[str]) -> str:
    """Those of all ranks, equal ones counted; the memory that is free differs a little, so the first one's is told."""
    if len(each) == 1:
        return each[0]
    kinds = Counter(device.partition(",")[0] for device in each)
    first = {kind: next(device for device in each if device.startswith(kind)) for kind in kinds}
    return f"{len(each)} ranks, on " + "; ".join(f"{count} x {first[kind]}" for kind, count in kinds.items())


def _in_words(number: int) -> str:
    """``135 M``, ``8.03 B``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
