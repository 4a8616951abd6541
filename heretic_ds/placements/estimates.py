"""From how a placement uses a rank to the bytes and seconds that this takes.

Bytes: what stays (weights, tables of edits, originals of edited weights on the host, reference distributions) and the
largest of what comes and goes (loading, a capture's batch, a pass over prompts, rows that are decoded). Seconds: a pass
takes as long as its multiplications or the reading of its weights, whichever is longer, and then its launches and what
ranks exchange (the roofline model: Williams et al. 2009, doi 10.1145/1498765.1498785).

Constants are measured by ``benchmarks/planner_accuracy.py``; each says of what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from heretic_ds.placements.costs import Cost, Facts, Resources

MIB = 2**20

IMPORTS = 520 * MIB
"""Host memory of a process that has imported PyTorch and transformers, tokenizer and allocator included (x86, CPU)."""
DEEPSPEED = 60 * MIB
"""What importing and starting DeepSpeed adds."""
CUDA_CONTEXT = 600 * MIB
"""Device memory of a process before it holds anything: context, kernels, cuBLAS's workspace. Vendors state no number;
some 500 MiB for PyTorch on an H100."""
READ_BUFFER = 8 * MIB
"""Through which goes what cannot be read where it belongs (:mod:`heretic_ds.checkpoint.files`)."""
MERGING = 1.4
"""Part of the weights that transformers needs on top of them while it puts experts together."""
OPERATIONS_A_MODULE = 6
"""Operations that PyTorch starts for one module of a block, those between modules included."""
OPERATIONS_AN_EXPERT = 6
"""The same for one expert that has tokens, where experts are looped over."""
SHARE_OF_PEAK = {"cuda": 0.6, "cpu": 1.0}
"""Part of a device's stated rates that matrix products reach; those of a CPU are measured, not stated."""


@dataclass(frozen=True)
class Exchange:
    """What ranks of a replica send one another."""

    members: int = 1
    """Ranks that take part."""
    token_bytes: float = 0.0
    """Sent by each rank for every token of a pass."""
    pass_bytes: float = 0.0
    """Sent by each rank in every pass, however many tokens that has."""
    row_bytes: float = 0.0
    """Sent by each rank for every row of a pass."""
    messages: float = 0.0
    """One after another in every pass."""
    hidden: bool = False
    """Whether it goes on while a rank computes."""


@dataclass(frozen=True)
class Use:
    """How a placement uses the fullest of its ranks."""

    degree: int
    """Ranks that hold one replica."""
    held: int
    """Bytes of weights that rest on the device."""
    replicas: int
    """Ranks, or groups of them, that work on prompts of their own."""
    share: float = 1.0
    """Part of the work on a row, and of its keys and values, that is one rank's."""
    stages: int = 1
    """Ranks that a row visits one after another."""
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
    exchange: Exchange = Exchange()
    fetched: int = 0
    """Bytes that come from the host in every pass."""
    workspace: int = 0
    """Bytes on the device beside all that, in the place of activations, keys and values."""
    operations: int | None = None
    """That are launched in a pass; None: as modules of blocks have them."""
    graphs: bool = False
    """Whether steps can be captured, so that nothing is launched one by one."""
    together: bool = True
    """Whether trials can share passes."""
    extra: int = 0
    """Host memory of libraries beside PyTorch and transformers."""


def estimate(facts: Facts, resources: Resources, phase: str, use: Use) -> Cost:
    """Bytes and seconds of one phase."""
    moments = _moments(facts, resources, phase, use)
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    device: dict[str, int] = {"weights": use.held, **fullest}
    host = {"libraries": IMPORTS + use.extra, "weights": use.resting}
    if not resources.on_cpu:
        device["context"] = CUDA_CONTEXT
    if phase == "evaluate":
        device["edit tables"] = _tables(facts, use)
        host["originals"] = math.ceil(facts.writers * use.held / facts.weights) if use.resting == 0 else 0
        own = math.ceil(facts.work.baseline_prompts / use.replicas)
        host["reference"] = own * facts.vocabulary * 4
    kept = {name: int(size) for name, size in device.items() if size}
    return Cost(
        kept, {name: n for name, n in host.items() if n}, _seconds(facts, resources, phase, use), batch_of(facts, use)
    )


def batch_of(facts: Facts, use: Use) -> int:
    """Rows of a batch: no more than a replica has."""
    work = facts.work
    rows = math.ceil(work.target_prompts * _together(facts, use) / use.replicas)
    return max(1, min(work.batch, rows))


def _together(facts: Facts, use: Use) -> int:
    return facts.work.together if use.together else 1


def _moments(facts: Facts, resources: Resources, phase: str, use: Use) -> list[Mapping[str, int]]:
    """What comes and goes at each moment that may be the fullest."""
    work, rows = facts.work, facts.work.batch
    if use.workspace:
        return [{"loading": use.loading}, {"workspace": use.workspace, "logits": rows * facts.vocabulary * 20}]
    passing = rows * work.longest_prompt
    moments: list[Mapping[str, int]] = [
        {"loading": use.loading},
        {"activations": activations(facts, passing, use.share), "gathered weights": use.gathered},
    ]
    if phase == "evaluate":
        logits = min(rows, work.baseline_prompts) * facts.vocabulary * (facts.dtype.itemsize + 16)
        cache = math.ceil(rows * (work.longest_prompt + work.new_tokens) * facts.cached * use.share)
        both = {"activations": activations(facts, passing, use.share), "gathered weights": use.gathered}
        moments += [{**both, "logits": logits}, {**both, "keys and values": cache}]
    return moments


def activations(facts: Facts, tokens: float, share: float) -> int:
    """Bytes that a pass over tokens needs at its widest point: inside an MLP, or where experts have their tokens."""
    width, size = facts.anatomy.width, facts.dtype.itemsize
    numbers = 4 * width + 3 * facts.inner * share
    if facts.experts is not None:
        numbers = max(numbers, 3 * width + facts.experts.per_token * (2 * width + 4 * facts.experts.inner * share))
    return int(tokens * numbers * size)


def _tables(facts: Facts, use: Use) -> int:
    """Bytes of what edits of outputs need: for each dense writer [L+1, D], for experts up to a budget."""
    if facts.work.row_norm != "full" or not use.together:
        return 0
    n, width, blocks = 4, facts.anatomy.width, facts.anatomy.n_blocks + 1
    dense = sum(w.experts is None for w in facts.anatomy.writers) * blocks * width * n
    experts = sum(w.experts or 0 for w in facts.anatomy.writers) * blocks * width * n
    return int(dense + min(experts, max(64 * MIB, 0.05 * use.held)))


def _seconds(facts: Facts, resources: Resources, phase: str, use: Use) -> dict[str, float]:
    """Loading, and the whole capture or one trial."""
    machine, work = resources.machine, facts.work
    here = min(resources.ranks, machine.devices_per_node)
    read = facts.weights * use.read_parts * here / (machine.disk_bandwidth)
    seconds = {"load": read + facts.weights * use.read_parts / machine.host_bandwidth}
    if phase == "capture":
        rows = math.ceil(work.train_prompts / use.replicas)
        seconds["capture"] = passes(facts, resources, use, rows, work.prompt_tokens)
        return seconds
    together = _together(facts, use)
    compared = math.ceil(together * work.baseline_prompts / use.replicas)
    answered = math.ceil(together * work.target_prompts / use.replicas)
    begun = passes(facts, resources, use, compared, work.prompt_tokens)
    begun += passes(facts, resources, use, answered, work.prompt_tokens)
    decoded = work.new_tokens * passes(facts, resources, use, answered, 1.0, work.prompt_tokens + work.new_tokens / 2)
    seconds["trial"] = (begun + decoded) / together
    return seconds


def passes(facts: Facts, resources: Resources, use: Use, rows: int, tokens: float, seen: float = 0.0) -> float:
    """Seconds of passes over so many ``tokens`` of each row, in batches; each row has ``seen`` as many before."""
    most = max(1, facts.work.batch)
    count = max(1.0, rows / most)
    return count * one_pass(facts, resources, use, min(rows, most), tokens, seen)


def one_pass(facts: Facts, resources: Resources, use: Use, rows: int, tokens: float, seen: float) -> float:
    """Seconds of one pass over ``rows`` of so many ``tokens`` each through a whole replica."""
    machine, experts = resources.machine, facts.experts
    reach, number, head = SHARE_OF_PEAK[machine.device], rows * tokens, facts.head
    active, touched = float(facts.dense - head), facts.dense * use.share
    looped = 0.0
    if experts is not None:
        part = experts.touched(number * use.sharers) / experts.number
        active += experts.bytes * experts.per_token / experts.number
        touched += part * experts.bytes * use.share / use.sharers
        looped = part * experts.number * experts.blocks / use.sharers if resources.on_cpu else 0.0
    multiplied = 2 * (active * number + head * rows) / facts.dtype.itemsize * use.share
    computed = multiplied / (machine.flops(facts.dtype) * reach)
    moved = (touched + rows * seen * facts.cached * use.share) / machine.memory_bandwidth
    operations = OPERATIONS_A_MODULE * facts.modules if use.operations is None else use.operations
    launched = machine.launch_seconds * (0.0 if use.graphs else operations + OPERATIONS_AN_EXPERT * looped)
    exchange, (bandwidth, latency) = use.exchange, resources.link(use.exchange.members)
    sent = exchange.pass_bytes + exchange.token_bytes * number + exchange.row_bytes * rows
    sending = sent / bandwidth + exchange.messages * latency
    working = max(computed + launched, moved, use.fetched / machine.host_bandwidth)
    return max(working, sending) if exchange.hidden else working + sending


def largest_streamed(facts: Facts) -> int:
    """Bytes of what the unsplit model has in memory at one time where it runs block by block."""
    return max(*facts.blocks, facts.embedding, facts.head) + READ_BUFFER
