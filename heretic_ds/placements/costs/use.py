"""How a placement uses a rank: what its ``cost`` says, and all that bytes and seconds follow from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heretic_ds.placements.costs.facts import Facts
from heretic_ds.placements.costs.machine import Resources

MIB = 2**20

DEEPSPEED = 45 * MIB
"""What importing and starting DeepSpeed adds."""
FSDP = 60 * MIB
"""What PyTorch's FSDP2 and its distributed tensors add."""
ZERO = 70 * MIB
"""What DeepSpeed's ZeRO adds to that."""
READ_BUFFER = 8 * MIB
"""Through which goes what cannot be read where it belongs (:mod:`heretic_ds.checkpoint.files`)."""
MERGING = 1.1
"""Part of the weights that transformers needs on top of them while it puts experts together on a CPU."""


BLOCKS_MERGED = 4
"""Blocks whose experts transformers has twice on a device other than the CPU: as many as it has threads that read ahead
(read off its sources, not measured)."""


@dataclass(frozen=True)
class Exchange:
    """What ranks of a replica send one another."""

    members: int = 1
    """Consecutive ranks among which it goes on."""
    token_bytes: float = 0.0
    """Sent by each rank for every token of a pass."""
    row_bytes: float = 0.0
    """Sent by each rank for every row of a pass."""
    pass_bytes: float = 0.0
    """Sent by each rank in every pass, however many tokens that has."""
    messages: float = 0.0
    """One after another in every pass."""
    hidden: bool = False
    """Whether it goes on while a rank computes."""


@dataclass(frozen=True)
class Use:
    """How a placement uses the fullest of its ranks."""

    held: int
    """Bytes of weights that rest on the device."""
    replicas: int
    """Ranks, or groups of them, that work on prompts of their own."""
    share: float = 1.0
    """Part of the work on a row that is one rank's while the row is there."""
    stages: int = 1
    """Ranks, or groups of them, that a row visits one after another."""
    microbatches: int = 1
    """Parts of a batch that are under way side by side."""
    caches: float = 1.0
    """Part of a row's keys and values that one rank keeps."""
    sharers: int = 1
    """Ranks over which a block's experts are shared out."""
    gathered: int = 0
    """Bytes of weights that come and go on the device in a pass."""
    resting: int = 0
    """Bytes of weights that rest on the host."""
    loading: int = READ_BUFFER
    """Bytes beside what is held while weights are read."""
    read_parts: float = 1.0
    """Part of the files that one rank reads."""
    exchanges: tuple[Exchange, ...] = ()
    fetched: int = 0
    """Bytes that come from the host in every pass."""
    workspace: int = 0
    """Bytes on the device in the place of activations, keys and values."""
    operations: int | None = None
    """That are launched in a pass; None: as modules of blocks have them."""
    graphs: bool = False
    """Whether steps can be captured, so that nothing is launched one by one."""
    together: bool = True
    """Whether trials can share passes."""
    reuses: bool = False
    """Whether passes of trials begin where the edited model begins to differ."""
    libraries: int = 0
    """Host memory of what it imports beside what every job does."""


def rows_of(facts: Facts, resources: Resources, phase: str, use: Use) -> int:
    """Rows that one replica has at one time: as many as a batch takes, or all that there are."""
    work = facts.work
    most = work.train_prompts if phase == "capture" else work.target_prompts * together(facts, resources, use)
    return max(1, min(work.batch, math.ceil(most / use.replicas)))


def together(facts: Facts, resources: Resources, use: Use) -> int:
    """Trials that share a pass: as asked for, or up to 4, on a CPU one for each replica."""
    if not use.together:
        return 1
    return facts.work.together or (min(4, use.replicas) if resources.on_cpu else 4)


def largest_streamed(facts: Facts) -> int:
    """Bytes of what the unsplit model has in memory at one time where it runs block by block."""
    return max(*facts.blocks, facts.embedding, facts.head) + READ_BUFFER
