"""What the tests of weights that ranks read together run on every rank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from heretic_ds.checkpoint.files import TensorFiles
from heretic_ds.checkpoint.open import LoadedModel, OpenedModel, load_weights
from heretic_ds.checkpoint.sharing import PartlyRead
from heretic_ds.errors import UserError
from heretic_ds.export.checkpoint import export_model
from heretic_ds.placements.base import load_whole
from heretic_ds.world import World
from tests.distributed.engines import job_for
from tests.distributed.files_ranks import digests


@contextlib.contextmanager
def on_machines(world: World, names: tuple[str, ...] | None) -> Iterator[None]:
    """Ranks run on machines of these names; None for one machine."""
    name = "here" if names is None else names[world.rank]
    world._machine.clear()
    with mock.patch("socket.gethostname", lambda: name):
        yield
    world._machine.clear()


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many bytes of tensors were read while the context lasts, as the only item of a list."""
    read, count = TensorFiles.read_into, [0]

    def counting(self: TensorFiles, name: str, target: torch.Tensor, *more: Any) -> None:
        count[0] += target.nbytes
        read(self, name, target, *more)

    with mock.patch.object(TensorFiles, "read_into", counting):
        yield count


def load(world: World, folder: str, dtype: str = "float32", share: bool = True) -> LoadedModel:
    """The whole model, as the placement ``replicated`` loads it; no tensor counts as too small to be shared."""
    job = job_for(world, folder, dtype=dtype)
    job.settings.load.share = share
    with mock.patch("heretic_ds.checkpoint.sharing._SMALL_BYTES", 1):
        return load_whole(job)


def compare(world: World, folder: str, dtype: str, machines: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Weights that are read together beside those of ordinary loading."""
    with on_machines(world, machines), counted() as count:
        together = load(world, folder, dtype)
    alone = load_weights(job_for(world, folder, dtype=dtype).opened)
    found, expected = (
        dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for model in (together.model, alone.model)
    )
    return {
        "names": found.keys() == expected.keys(),
        "unequal": [
            name for name in expected.keys() & found.keys()
            if expected[name].dtype != found[name].dtype or not torch.equal(expected[name], found[name])
        ],
        "parameters": [len(list(loaded.model.parameters())) for loaded in (together, alone)],
        "alike": together.dtype == alone.dtype and type(together.model) is type(alone.model),
        "ready": not together.model.training and not any(p.requires_grad for p in together.model.parameters()),
        "read": count[0],
        "whole": sum(parameter.nbytes for parameter in together.model.parameters()),
    }  # fmt: skip


def saved(world: World, folder: str, target: str) -> list[dict[str, str]]:
    """Digests of the files of a model that was read together and saved, and of one that was read alone."""
    made = []
    for share in (True, False):
        loaded, place = load(world, folder, share=share), Path(target) / str(share)
        world.decide(lambda loaded=loaded, place=place: export_model(loaded, place, "card", {}) and None)
        made.append(digests(place))
    return made


def refusal(world: World, folder: str, where: int | None = None) -> str:
    """What this rank says of weights that cannot be loaded; those of one rank alone, where it is named."""

    def fail(*args: Any) -> None:
        raise UserError("model.safetensors ends too early; download or copy it again")

    broken = mock.patch.object(TensorFiles, "read_into", fail) if world.rank == where else contextlib.nullcontext()
    try:
        with broken:
            load(world, folder)
    except UserError as error:
        return str(error)
    return "nothing"


def dtype_reached(world: World, folder: str) -> str:
    """The dtype that ranks end with where float16 is tried first, then float32."""
    with mock.patch.object(OpenedModel, "dtypes", [torch.float16, torch.float32]):
        return str(load(world, folder).dtype)


def told(world: World, folder: str, machines: tuple[str, ...] | None, pickled: bool) -> list[str]:
    """What is logged of loading in which nothing can be shared, and is not."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("heretic_ds.placements.base")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    job = job_for(world, folder)
    job.settings.load.share = True
    if pickled:
        job.opened.headers = {}
    exchange = mock.patch.object(PartlyRead, "exchange", side_effect=AssertionError("something was shared"))
    try:
        with on_machines(world, machines), exchange:
            load_whole(job)
    finally:
        logger.removeHandler(handler)
    return lines
