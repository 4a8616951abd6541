"""What the tests of packed checkpoints run on every rank."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from heretic_ds.checkpoint.files import TensorFiles
from heretic_ds.placements import build_engine
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed.engines import EDIT, ablation_for, job_for, prompts, target


def measure(
    world: World, folder: str, placement: str, phase: str = "evaluate", dtype: str = "float32", **options: Any
) -> dict[str, Any]:
    """What an engine, checked and built as a job's is, says of a model, and the bytes of codes that were read for it.

    Scores are of the original and of an edit; of a placement that only captures, means and answers alone.
    """
    job, rows = job_for(world, folder, dtype=dtype), prompts()
    setattr(job.settings, phase, target(placement, **options))
    job.settings.load.share = True
    read, codes = TensorFiles._read_box, [0]

    def counting(self: TensorFiles, info: Any, width: int, height: Any, columns: Any, into: Any) -> None:
        codes[0] += into.numel() if info.dtype != "F32" else 0
        read(self, info, width, height, columns, into)

    with (
        mock.patch.object(TensorFiles, "_read_box", counting),
        mock.patch("heretic_ds.checkpoint.sharing._SMALL_BYTES", 1),
    ):
        engine: Any = build_engine(job, phase)
    with contextlib.closing(engine):
        found = {"means": engine.capture(rows), "answers": engine.generate(rows, [None]), "codes": codes[0]}
        if phase == "evaluate":
            engine.prepare(ablation_for(engine, "full"))
            reference = Divergence().begin(engine, rows)
            found |= {"kl": reference.of([EDIT])[0], "edited": engine.generate(rows, [EDIT])}
    return found
