"""Loading a model whose weights lie on several ranks in the best dtype that works there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from transformers import PreTrainedModel

from heretic_ds.checkpoint.fitness import dtype_name, forward_problem
from heretic_ds.device_memory import release_memory
from heretic_ds.errors import NotFinite, UserError

if TYPE_CHECKING:
    from heretic_ds.checkpoint.open import OpenedModel
    from heretic_ds.world import World

log = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def in_some_dtype(
    opened: OpenedModel,
    world: World,
    load: Callable[[torch.dtype], Loaded],
    model_of: Callable[[Loaded], PreTrainedModel],
    release: Callable[[Loaded], None],
    compared: bool = False,
) -> Loaded:
    """What ``load`` gives in the first dtype in which weights and a first forward are finite, on every rank.

    ``load`` raises :class:`NotFinite`, on every rank alike, for weights that the dtype cannot hold, and closes what it
    opened; their memory is free before the next dtype is tried. Every rank has to call this: the first forward may hold
    collectives. A caller that goes on to compare logits says so by ``compared``, and gets the last dtype without a
    forward. Raises UserError where no dtype serves.
    """
    problem = ""
    for dtype in opened.dtypes:
        if problem:
            log.warning("%s; loading it in %s instead", problem, dtype_name(dtype))
            release_memory()  # the error that told of it held, in circles, on to what was loaded
        try:
            loaded = load(dtype)
        except NotFinite as error:
            if dtype == opened.dtypes[-1]:
                raise
            problem = str(error)
            continue
        if compared and dtype == opened.dtypes[-1]:
            return loaded
        found = next(filter(None, world.gather(forward_problem(model_of(loaded)))), None)
        if found is None:
            return loaded
        release(loaded)
        del loaded
        problem = f"a first forward of {opened.choice.path} in {dtype_name(dtype)} {found}"
    raise UserError(f"{problem}; set another model.dtype (float32 is the safest)")
