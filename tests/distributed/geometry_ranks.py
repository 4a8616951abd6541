"""What the tests of residuals run on every rank."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from heretic_ds.placements import build_engine
from heretic_ds.runner import taps
from heretic_ds.world import World
from tests.distributed.engines import job_for, prompts, target


def residuals(
    world: World,
    folder: str,
    placement: str,
    on_the_way: int = 2**28,
    quantile: float = 1.0,
    count: int = 7,
    **options: Any,
) -> dict[str, Any]:
    """Residuals [L+1, N, D] of all prompts on rank 0, the means that a capture gives, and the sizes of what came."""
    job = job_for(world, folder, batch_size=2)
    job.settings.capture = target(placement, **options)
    parts: dict[int, Tensor] = {}
    sizes: list[int] = []

    def take(places: Any, residual_LBD: Tensor) -> None:
        sizes.append(residual_LBD.nbytes)
        assert not parts.keys() & set(places)
        parts.update(zip(places, residual_LBD.unbind(1), strict=True))

    with (
        contextlib.closing(build_engine(job, "capture")) as engine,
        mock.patch.object(taps, "BYTES_ON_THE_WAY", on_the_way),
    ):
        means = engine.capture(prompts(count), quantile)
        engine.residuals(prompts(count), take, quantile)
    whole = torch.stack([parts[place].clone() for place in sorted(parts)], dim=1) if parts else None
    return {"residuals": whole, "means": means, "sizes": sizes}
