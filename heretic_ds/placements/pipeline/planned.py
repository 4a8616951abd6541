"""What a stage would hold and send, from a model on the meta device alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from heretic_ds.placements.costs import Exchange, Facts, sum_of
from heretic_ds.placements.pipeline import structure
from heretic_ds.placements.pipeline.partition import balanced
from heretic_ds.placements.pipeline.stage import head_path


def refuse(facts: Facts, stages: int, setting: str) -> None:
    """Raise CannotStage for a model whose blocks cannot lie in so many stages."""
    blocks = facts.anatomy.n_blocks
    if stages > blocks:
        raise structure.CannotStage(f"{setting}={stages} asks for more stages than this model's {blocks} blocks")
    facts.once("stages", lambda: structure.outputs_are_tuples(copy.deepcopy(facts.model), facts.anatomy))


def fullest_stage(facts: Facts, stages: int, held: Sequence[int]) -> tuple[int, int]:
    """Bytes of the stage that holds most, of each block as much as ``held`` says, and blocks of the longest one.

    Stages are balanced by whole parameters.
    """
    whole = [*facts.blocks]
    whole[0], whole[-1] = whole[0] + facts.embedding, whole[-1] + facts.head
    groups = facts.once(("stages", stages), lambda: balanced(whole, stages))
    return max(sum(held[group.start : group.stop]) for group in groups), max(map(len, groups))


def held_by_block(facts: Facts, sizes: Mapping[str, int]) -> list[int]:
    """Bytes of each block, of each parameter as much as ``sizes`` say; embedding and head go with the ends."""
    anatomy = facts.anatomy
    held = [sum_of(sizes, f"{anatomy.blocks}.{block}.") for block in range(anatomy.n_blocks)]
    embedding = sum_of(sizes, f"{anatomy.embedding}.")
    held[0] += embedding
    held[-1] += embedding if facts.tied else sum_of(sizes, f"{head_path(facts.model)}.")
    return held


def between_stages(facts: Facts, stages: int, members: int) -> tuple[Exchange, ...]:
    """A hidden state handed on, and a token told, for each part of a batch; ``members`` ranks make up a replica."""
    if stages == 1:
        return ()
    return (Exchange(members, token_bytes=facts.anatomy.width * facts.dtype.itemsize, messages=2),)
