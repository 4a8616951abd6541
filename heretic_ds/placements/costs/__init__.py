"""What placements tell of themselves before anything is read: facts of a model and a job, machines, bytes and seconds.

A placement says in its ``cost`` how it uses a rank (:class:`Use`); the arithmetic that follows is the same for all.
Constants are measured by ``benchmarks/planner_accuracy.py``; each says of what.
"""

from heretic_ds.placements.costs.cost import USABLE, Cost, estimate
from heretic_ds.placements.costs.facts import Experts, Facts, Work, bytes_of, sum_of
from heretic_ds.placements.costs.machine import Machine, Resources, divisors
from heretic_ds.placements.costs.use import (
    BLOCKS_MERGED,
    DEEPSPEED,
    FSDP,
    MERGING,
    READ_BUFFER,
    ZERO,
    Exchange,
    Use,
    largest_streamed,
)

__all__ = [
    "BLOCKS_MERGED",
    "DEEPSPEED",
    "FSDP",
    "MERGING",
    "READ_BUFFER",
    "USABLE",
    "ZERO",
    "Cost",
    "Exchange",
    "Experts",
    "Facts",
    "Machine",
    "Resources",
    "Use",
    "Work",
    "bytes_of",
    "divisors",
    "estimate",
    "largest_streamed",
    "sum_of",
]
