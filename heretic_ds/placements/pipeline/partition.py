"""Which blocks each stage of a pipeline holds: consecutive ones, so that the largest stage is as small as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint


def stages_of(anatomy: Anatomy, checkpoint: Checkpoint, head: str | None, count: int) -> list[range]:
    """The blocks of each of ``count`` stages, at least one each, balanced by the bytes of weights.

    The first stage has the embedding too, the last one the head, at the path ``head``, also where it is the embedding's
    weight once more.
    """
    blocks, embedding = [0] * anatomy.n_blocks, f"{anatomy.embedding}."
    for name, size in _bytes(checkpoint).items():
        if name.startswith(f"{anatomy.blocks}."):
            blocks[int(name.removeprefix(f"{anatomy.blocks}.").partition(".")[0])] += size
        elif name.startswith(embedding):
            blocks[0] += size
        elif head is not None and name.startswith(f"{head}."):
            blocks[-1] += size
    return balanced(blocks, count)


def _bytes(checkpoint: Checkpoint) -> Mapping[str, int]:
    return {name: prod(shape) * checkpoint.dtypes[name].itemsize for name, shape in checkpoint.shapes.items()}


def balanced(weights: Sequence[int], count: int) -> list[range]:
    """Consecutive items in ``count`` groups, none empty, of which the heaviest is as light as can be.

    There have to be as many items as groups. Groups are filled from the first on.
    """
    low, high = max(weights), sum(weights)
    while low < high:  # the least limit within which as many groups are enough
        middle = (low + high) // 2
        if len(_filled(weights, middle, count)) <= count:
            high = middle
        else:
            low = middle + 1
    return _filled(weights, low, count)


def _filled(weights: Sequence[int], most: int, count: int) -> list[range]:
    """Groups of at most so much weight, each as long as may be, but for items that groups to come have to have."""
    groups: list[range] = []
    start, weight = 0, 0
    for at, each in enumerate(weights):
        needed = count - len(groups) - 1  # groups after this one
        if at > start and (weight + each > most or len(weights) - at <= needed):
            groups.append(range(start, at))
            start, weight = at, 0
        weight += each
    return [*groups, range(start, len(weights))]
