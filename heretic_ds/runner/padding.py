"""How rows of unlike lengths are best put into batches, where every row is padded to the longest of its batch."""

from __future__ import annotations

from collections.abc import Sequence

PASS_IN_TOKENS = 192
"""Padding tokens that one more forward pass is worth.

A pass costs its launches and the reading of all weights beside its tokens: about 60 tokens' time for a tiny model on a
CPU, hardly any for a larger one there, and a few hundred for a model of 8 billion parameters on a GPU.
"""


def first_cut(lengths: Sequence[int]) -> int:
    """How many of the first rows, of descending ``lengths``, should be a batch of their own.

    The rest is left out where that saves more padding than a pass costs. All of them where nothing saves as much.
    """
    stop = len(lengths)
    while True:
        saving, cut = max(
            (((stop - at) * (lengths[0] - lengths[at]), at) for at in _steps(lengths[:stop])), default=(0, stop)
        )
        if saving <= PASS_IN_TOKENS:
            return stop
        stop = cut


def batches_of(lengths: Sequence[int]) -> list[range]:
    """All rows, of descending ``lengths``, in batches as :func:`first_cut` makes them."""
    start, batches = 0, []
    while start < len(lengths):
        stop = start + first_cut(lengths[start:])
        batches.append(range(start, stop))
        start = stop
    return batches


def _steps(lengths: Sequence[int]) -> list[int]:
    """Positions at which the length changes."""
    return [at for at in range(1, len(lengths)) if lengths[at] != lengths[at - 1]]
