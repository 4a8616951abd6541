"""The residuals that directions are made of, measured layer by layer and drawn."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import write_atomically
from heretic_ds.foreign.reading import read_json, reading
from heretic_ds.geometry.measures import LayerGeometry, measure
from heretic_ds.geometry.projection import Projection, pacmap, pca, require_pacmap, spread_out
from heretic_ds.geometry.store import ResidualStore
from heretic_ds.prompts import KINDS
from heretic_ds.report.geometry import draw_layers, draw_projections, geometry_table
from heretic_ds.settings import Settings
from heretic_ds.stages.measure import direction_fingerprint
from heretic_ds.stages.opening import Run
from heretic_ds.world import World

log = logging.getLogger(__name__)

SCHEMA = 1
DRAWN = 12
"""Blocks that are drawn where the settings name none."""
_ADVICE = "remove it, and it is measured anew"
_TOLD_EVERY = 2.0
"""Seconds between two words on how far the measuring is: a layer of 800 prompts of width 4096 takes about one."""


def refuse_missing_projection(settings: Settings, world: World) -> None:
    """Find out before anything is loaded that residuals cannot be drawn as asked. Raises UserError."""
    if settings.task.projection == "pacmap":
        world.decide(require_pacmap)


def measure_geometry(run: Run) -> dict[str, Any]:
    """What ``geometry.json`` holds, on every rank; read back where the run folder has it, else captured in one pass.

    Raises UserError for blocks that the model lacks and residuals that are not finite.
    """
    asked = {
        "fingerprint": direction_fingerprint(run),
        "projection": run.settings.task.projection,
        "blocks": drawn_blocks(run.settings.task.blocks, run.job.anatomy.n_blocks),
    }
    stored: dict[str, Any] | None = run.world.decide(lambda: _stored(run, asked))
    if stored is not None:
        log.info("%s holds these numbers already", run.path / "geometry.json")
        return stored
    return _captured(run, asked)


def drawn_blocks(named: Sequence[int], n_blocks: int) -> list[int]:
    """The blocks to draw. Raises UserError where the model lacks one of those named."""
    beyond = [block for block in named if not 0 <= block < n_blocks]
    if beyond:
        raise UserError(f"task.blocks names {beyond[0]}, but the model's blocks are 0 to {n_blocks - 1}")
    return sorted(set(named)) or spread_out(n_blocks, DRAWN)


def _stored(run: Run, asked: dict[str, Any]) -> dict[str, Any] | None:
    file = run.path / "geometry.json"
    if not file.is_file():
        return None
    found = read_json(file, _ADVICE)
    if found.get("schema") != SCHEMA or found.get("asked") != asked:
        return None
    with reading(file, _ADVICE, "is damaged"):
        _check(found)
    return found


def _check(found: dict[str, Any]) -> None:
    """Raise some error where what is shown and drawn of stored numbers is not there."""
    for layer in found["layers"]:
        for number in LayerGeometry.from_dict(layer).to_dict().values():
            float(number or 0)
    for projection in found["projections"]:
        numbers = [number for kind in KINDS for x, y in projection[kind] for number in (x, y)]
        sum(map(float, [projection["block"], *numbers, *(projection["explained"] or ())]))


def _captured(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """Residuals stream into a file of the run folder on rank 0, which reads them layer by layer."""
    world, anatomy, engine = run.world, run.job.anatomy, run.lay_out("capture")
    kinds = [run.job.prompts(f"{kind}.train").rows for kind in KINDS]
    targets, rows = len(kinds[0]), [row for each in kinds for row in each]
    stores: list[ResidualStore] = []  # rank 0's
    log.info("capturing the residuals of %d prompts", len(rows))

    def open_store() -> None:
        stores.append(ResidualStore(run.path, anatomy.n_blocks + 1, len(rows), anatomy.width))

    world.decide(open_store)
    with run.timed("capture"):
        engine.residuals(rows, lambda *given: stores[0].put(*given), run.settings.direction.winsorize_quantile)
    run.remember()  # batch sizes that were measured

    def read() -> dict[str, Any]:
        layers = measure((residual_ND[:targets], residual_ND[targets:]) for residual_ND in _layers(stores[0]))
        return {
            "schema": SCHEMA,
            "model": run.settings.model.path,
            "prompts": dict(zip(KINDS, map(len, kinds), strict=True)),
            "asked": asked,
            "layers": [
                {"entry": entry, "block": entry - 1 if entry else None, **layer.to_dict()}
                for entry, layer in enumerate(layers)
            ],
            "projections": [_projected(stores[0], block, targets, asked["projection"]) for block in asked["blocks"]],
        }

    return world.decide(read, "measuring the geometry of residuals")


def _layers(store: ResidualStore) -> Iterator[Tensor]:
    """Residuals [N, D] of each entry of the stream. Raises UserError where some are not finite."""
    told = time.monotonic()
    for entry in range(store.entries):
        if time.monotonic() - told > _TOLD_EVERY:
            log.info("measured %d of %d layers", entry, store.entries)
            told = time.monotonic()
        residual_ND = store.layer(entry)
        if not residual_ND.isfinite().all():
            raise UserError("the residuals of the train prompts are not finite; set model.dtype=float32")
        yield residual_ND


def _projected(store: ResidualStore, block: int, targets: int, method: str) -> dict[str, Any]:
    residual_ND = store.layer(block + 1)
    is_target_N = torch.arange(len(residual_ND)) < targets
    found: Projection = pca(residual_ND, is_target_N) if method == "pca" else pacmap(residual_ND)
    return {
        "block": block,
        "explained": None if found.explained is None else [round(share, 6) for share in found.explained],
        "target": _points(found.point_N2[:targets]),
        "baseline": _points(found.point_N2[targets:]),
    }


def _points(point_N2: Tensor) -> list[list[float]]:
    """Coordinates with as many digits as a picture shows."""
    return [[float(f"{number:.5g}") for number in point] for point in point_N2.tolist()]


def show_geometry(run: Run, found: dict[str, Any]) -> None:
    """Show the table, and leave numbers and pictures in the run folder."""
    layers = [LayerGeometry.from_dict(layer) for layer in found["layers"]]
    run.console.print(geometry_table(layers, run.console.width))
    if run.folder is None:
        return
    lines = ",\n  ".join(json.dumps(layer, allow_nan=False) for layer in found["layers"])
    rest = json.dumps({key: value for key, value in found.items() if key != "layers"}, allow_nan=False)
    write_atomically(run.folder.geometry, f'{rest[:-1]},\n "layers": [\n  {lines}\n ]}}\n')
    draw_layers(run.path / "geometry.png", layers, found["model"])
    method = found["asked"]["projection"]
    plot = run.path / f"geometry_{method}.png"
    draw_projections(plot, found["projections"], method, found["model"])
    log.info("numbers and pictures are in %s, geometry.png and %s", run.folder.geometry, plot.name)
