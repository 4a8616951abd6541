"""What the tests of memory that runs out on one rank alone run on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from heretic_ds.errors import UserError
from heretic_ds.placements import build_engine
from heretic_ds.scoring.kl import Divergence
from heretic_ds.world import World
from tests.distributed.engines import EDIT, ablation_for, job_for, prompts, target

MOST_TOKENS = 24
"""So many tokens of a pass does the starved rank have memory for: two of the prompts, three of the short ones."""


def engine_of(world: World, folder: str, placement: str, batch_size: int) -> Any:
    """An engine on all ranks of the phase that the placement serves."""
    phase = "capture" if placement == "zero3" else "evaluate"
    job = job_for(world, folder, batch_size)
    setattr(job.settings, phase, target(placement))
    return build_engine(job, phase)


@contextlib.contextmanager
def starved(engine: Any, most_tokens: int = MOST_TOKENS, where: str = "block", block: int = 1) -> Iterator[None]:
    """Memory runs out within a block, between two collectives, where a pass has too many tokens; or in the head, after
    a pass's last collective."""

    def full(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        if hidden_BSD.shape[:-1].numel() > most_tokens:
            raise torch.OutOfMemoryError("pretended")

    path = "lm_head" if where == "head" else f"{engine.anatomy.blocks}.{block}.self_attn"
    handle = engine.model.get_submodule(path).register_forward_pre_hook(full, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def scores(engine: Any, evaluates: bool) -> dict[str, Any]:
    """All that an engine says of a few prompts."""
    found: dict[str, Any] = {"means": engine.capture(prompts())}
    if evaluates:
        engine.prepare(ablation_for(engine, "full"))
        reference = Divergence().begin(engine, prompts())
        found["kl"] = reference.of([EDIT, None])
    found["answers"] = engine.generate(prompts(), [None])
    return found


def starved_scores(world: World, folder: str, placement: str, batch_size: int) -> dict[str, Any]:
    """:func:`scores` where memory runs out on the last rank alone, with batches of a size, or measured ones (0); beside
    those with memory enough."""
    with contextlib.closing(engine_of(world, folder, placement, 1)) as engine:
        expected = scores(engine, placement != "zero3")
    with contextlib.closing(engine_of(world, folder, placement, batch_size)) as engine:
        narrow = starved(engine) if world.rank == world.size - 1 else contextlib.nullcontext()
        try:
            with narrow:
                found = scores(engine, placement != "zero3")
        except UserError as error:
            return {"said": str(error)}
        return {"found": found, "expected": expected, "sizes": dict(engine.batch_sizes)}


def measured_by_its_passes(world: World, folder: str) -> dict[str, Any]:
    """Means of many prompts whose batch size is measured by the first of their passes, where the last rank has memory
    for three of the longest; beside those of one prompt at a time."""
    many = prompts() * 6
    with contextlib.closing(engine_of(world, folder, "replicated", 1)) as engine:
        expected = engine.capture(many)
    with contextlib.closing(engine_of(world, folder, "replicated", 0)) as engine:
        with starved(engine, 40) if world.rank == world.size - 1 else contextlib.nullcontext():
            means = engine.capture(many)
        return {"means": means, "expected": expected, "size": engine.batch_sizes["capture"]}


def answers_of_a_starved_head(world: World, folder: str, placement: str) -> list[Any]:
    """Answers, and the rows of a batch that is left, where the last rank has memory for two rows in the head; and those
    with memory enough."""
    with contextlib.closing(engine_of(world, folder, placement, 1)) as engine:
        expected = engine.generate(prompts(), [None])
    with contextlib.closing(engine_of(world, folder, placement, 4)) as engine:
        narrow = starved(engine, 2, "head") if world.rank == world.size - 1 else contextlib.nullcontext()
        with narrow:
            found = engine.generate(prompts(), [None])
        return [found == expected, engine.batch_sizes["generate"]]


def never_fits(world: World, folder: str, placement: str) -> str:
    """What ranks say where one of them has no memory for a single row."""
    with contextlib.closing(engine_of(world, folder, placement, 4)) as engine:
        try:
            with starved(engine, 0) if world.rank else contextlib.nullcontext():
                engine.capture(prompts())
        except UserError as error:
            return str(error)
    return "nothing"
