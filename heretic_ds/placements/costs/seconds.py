"""Seconds of a phase, from how a placement uses a rank.

A pass takes as long as its multiplications or the reading of its weights, keys and values, whichever is longer (the
roofline model: Williams et al. 2009, doi 10.1145/1498765.1498785), beside that its launches, and what ranks exchange:
bytes over the slowest way among them, and a latency for each message.
"""

from __future__ import annotations

import math

from heretic_ds.placements.costs.facts import Facts
from heretic_ds.placements.costs.machine import Resources
from heretic_ds.placements.costs.use import Use, rows_of, together

OPERATIONS_A_MODULE = 6
"""Operations that PyTorch starts for one module of a block, those between modules included."""
OPERATIONS_AN_EXPERT = 6
"""The same for one expert that has tokens, where experts are looped over."""
SHARE_OF_PEAK = {"cuda": 0.6, "cpu": 1.0}
"""Part of a device's rates that matrix products reach: those of a GPU are stated, those of a CPU measured."""
UNPACKED_A_SECOND = 2e8
"""Numbers that one thread of a CPU makes of codes and scales (``benchmarks/packed_loading.py``); a GPU's way there is
longer than what it does with them."""
SHARE_COMPUTED = 0.5
"""About what is left of a trial's pass over prompts where it begins with the first edited block."""


def of_phase(facts: Facts, resources: Resources, phase: str, use: Use) -> dict[str, float]:
    """Loading, and the whole capture or one trial."""
    machine, work = resources.machine, facts.work
    here, part = min(resources.ranks, machine.devices_per_node), facts.weights * use.read_parts
    read = (facts.stored or facts.weights) * use.read_parts
    seconds = {"load": read * here / machine.disk_bandwidth + part / machine.host_bandwidth}
    if facts.stored and resources.on_cpu:
        seconds["load"] += part / facts.dtype.itemsize / UNPACKED_A_SECOND
    if phase == "capture":
        rows = math.ceil(work.train_prompts / use.replicas)
        seconds["capture"] = _passes(facts, resources, phase, use, rows, work.prompt_tokens)
        return seconds
    trials, share = together(facts, resources, use), SHARE_COMPUTED if use.reuses else 1.0
    compared, answered = (
        math.ceil(trials * count / use.replicas) for count in (work.baseline_prompts, work.target_prompts)
    )
    over_prompts = sum(
        _passes(facts, resources, phase, use, rows, share * work.prompt_tokens) for rows in (compared, answered)
    )
    seen = work.prompt_tokens + work.new_tokens / 2
    decoding = work.new_tokens * _passes(facts, resources, phase, use, answered, 1.0, seen)
    seconds["trial"] = (over_prompts + decoding) / trials
    return seconds


def _passes(
    facts: Facts, resources: Resources, phase: str, use: Use, rows: int, tokens: float, seen: float = 0.0
) -> float:
    """Seconds of passes over so many ``tokens`` of each row, in batches; each row has ``seen`` as many before."""
    batch = min(rows, rows_of(facts, resources, phase, use))
    count, parts = rows / batch, min(use.microbatches, batch) if use.stages > 1 else 1
    turns = count * parts + (use.stages - 1 if seen == 0.0 else max(0, use.stages - parts) * count)
    return turns * _turn(facts, resources, use, batch / parts, tokens, seen)


def _turn(facts: Facts, resources: Resources, use: Use, rows: float, tokens: float, seen: float) -> float:
    """Seconds of one pass over ``rows`` of so many ``tokens`` each on one rank; of a pipeline, through one stage."""
    machine, experts, number, head = resources.machine, facts.experts, rows * tokens, facts.head
    share = use.share / use.stages
    active, touched, looped = float(facts.dense - head), facts.dense * share, 0.0
    if experts is not None:
        part = experts.touched(number * use.sharers) / experts.number
        active += experts.bytes * experts.per_token / experts.number
        touched += part * experts.bytes * share / use.sharers
        looped = part * experts.number * experts.blocks / use.sharers / use.stages if resources.on_cpu else 0.0
    multiplied = 2 * (active * number + head * rows) / facts.dtype.itemsize * share
    computed = multiplied / (machine.flops(facts.dtype) * SHARE_OF_PEAK[machine.device])
    moved = (touched + rows * seen * facts.cached * use.caches) / machine.memory_bandwidth
    operations = OPERATIONS_A_MODULE * facts.modules / use.stages if use.operations is None else use.operations
    captured = use.graphs and seen > 0.0  # passes over prompts are not
    launched = machine.launch_seconds * (0.0 if captured else operations + OPERATIONS_AN_EXPERT * looped)
    working = max(computed + launched, moved, use.fetched / machine.host_bandwidth)
    sending = hidden = 0.0
    for exchange in use.exchanges:
        bandwidth, latency = resources.link(exchange.members)
        sent = exchange.pass_bytes + exchange.token_bytes * number + exchange.row_bytes * rows
        seconds = sent / bandwidth + exchange.messages * latency
        sending, hidden = (sending, hidden + seconds) if exchange.hidden else (sending + seconds, hidden)
    return max(working, hidden) + sending
