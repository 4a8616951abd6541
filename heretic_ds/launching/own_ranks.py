"""A command that starts its ranks by itself: ``run.launch``, and what it says where GPUs would be left idle."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heretic_ds.errors import UserError
from heretic_ds.launching.plan import Launch, gpus
from heretic_ds.launching.supervisor import Supervisor, supervise
from heretic_ds.settings import AUTO

if TYPE_CHECKING:
    from heretic_ds.settings import Settings

_TASKS = ("abliterate", "evaluate", "export")
"""Those that several ranks can share."""


def ranks_to_start(settings: Settings) -> int:
    """How many ranks ``run.launch`` asks this process to start; 0 where it is to do the work by itself.

    Ranks, which have the same settings, start none. Raises UserError for more ranks than GPUs.
    """
    wanted = settings.run.launch
    if wanted is None or "RANK" in os.environ or settings.task.name not in _TASKS:
        return 0
    devices = gpus(_environment(settings))
    if wanted == AUTO:
        return len(devices) if len(devices) > 1 else 0
    if devices and int(wanted) > len(devices):
        raise UserError(
            f"run.launch={wanted}, but {len(devices)} GPUs can be used here; set run.launch={AUTO}, or "
            "model.device=cpu for ranks without GPUs"
        )
    return int(wanted)


def start_ranks(settings: Settings, words: Sequence[str], ranks: int) -> int:
    """Run the command that these words are on so many ranks, and wait for their end. Returns its exit status.

    Signals mean what they mean under ``launch/run.sh``.
    """
    changed = {name: value for name, value in _environment(settings).items() if os.environ.get(name) != value}
    return supervise(Supervisor(Launch(tuple(words), ranks, env=changed)))


def advice(settings: Settings, words: Sequence[str]) -> str | None:
    """What to say where this process takes one of several GPUs: the command that takes all. None elsewhere."""
    alone = "RANK" not in os.environ and settings.run.launch is None
    if not alone or settings.task.name not in _TASKS or settings.model.device not in ("auto", "cuda"):
        return None
    import torch  # asked whether there really are some, as what the variables say need not be

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return None
    command = shlex.join([*_this_program(), *words, f"run.launch={AUTO}"])
    return f"{count} GPUs can be used here, and one process takes one of them; to take all: {command}"


def _environment(settings: Settings) -> dict[str, str]:
    """This process's variables, and what tells the launcher that ranks are to leave GPUs alone."""
    on_cpu = {"DS_ACCELERATOR": "cpu"} if settings.model.device == "cpu" else {}
    return {**os.environ, **on_cpu}


def _this_program() -> list[str]:
    """How this process was called, without its arguments."""
    called = Path(sys.argv[0])
    return [sys.executable, "-m", "heretic_ds"] if called.name == "__main__.py" else [str(called)]
