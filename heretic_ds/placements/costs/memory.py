"""Bytes of a rank, from how a placement uses it.

They are what stays (weights, tables of edits, states of known prompts, originals of edited weights, reference
distributions) and the largest of what comes and goes: loading, a pass over prompts, logits, rows that are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from heretic_ds.placements.costs.facts import Facts
from heretic_ds.placements.costs.machine import Resources
from heretic_ds.placements.costs.use import MIB, Use, rows_of, together

ALLOCATOR = 36 * MIB
"""What the C library's allocator holds beside what is in use, while models of 30 to 400 million parameters run."""
UNEVEN = 48 * MIB
"""More of that where there are experts, whose tokens come and go in blocks of all sizes: one job had peaks of 912 to
1020 MiB on two ranks in five runs."""
CUDA_CONTEXT = 600 * MIB
"""Device memory of a process before it holds anything: context, kernels, workspace of cuBLAS. Vendors state no number;
some 500 MiB for PyTorch on an H100."""
_LEAST_KEPT, _SHARE_KEPT, _SETS = 64 * MIB, 0.1, 2
"""Of states of known prompts (:mod:`heretic_ds.runner.reuse`): this for a set, or that share of the weights."""
_LEAST_TABLES, _SHARE_TABLES = 64 * MIB, 0.05
"""Of tables of experts (:mod:`heretic_ds.edits.tables`)."""


def memory(facts: Facts, resources: Resources, phase: str, use: Use) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the device and of the host beside it, by what lies in them, at the fullest moment."""
    moments = _moments(facts, resources, phase, use)
    device: dict[str, float] = {"weights": use.held}
    allocator = ALLOCATOR + (UNEVEN if facts.experts else 0)
    host: dict[str, float] = {
        "libraries": resources.machine.process_memory + use.libraries + allocator,
        "weights": use.resting,
    }
    if not resources.on_cpu:
        device["context"] = CUDA_CONTEXT
    added: dict[str, float] = {}
    if phase == "evaluate":
        added = {"edit tables": _tables(facts, use), "known prompts": _known_prompts(facts, use) if use.reuses else 0.0}
    apart: dict[str, float] = {}
    if phase == "evaluate":
        apart["originals"] = facts.edited_in_place * (use.held + use.resting) / facts.held
        apart["reference"] = math.ceil(facts.work.baseline_prompts / use.replicas) * facts.vocabulary * 4
    fullest = max(moments, key=lambda moment: sum(moment.values()))
    running = sum(fullest.values()) + sum(added.values()) + (sum(apart.values()) if resources.on_cpu else 0.0)
    if use.loading > running:
        return _whole({**device, "loading": use.loading}), _whole(host if resources.on_cpu else {**host, **apart})
    return _whole({**device, **fullest, **added}), _whole({**host, **apart})


def _whole(sizes: Mapping[str, float]) -> dict[str, int]:
    return {name: math.ceil(size) for name, size in sizes.items() if size}


def _moments(facts: Facts, resources: Resources, phase: str, use: Use) -> list[Mapping[str, int]]:
    """What comes and goes at each moment of passes that may be the fullest."""
    work, rows = facts.work, rows_of(facts, resources, phase, use)
    of_logits = facts.vocabulary * (facts.dtype.itemsize + 16)  # the model's; log-softmax, probabilities, their terms
    if use.workspace:
        return [{"workspace": use.workspace, "logits": rows * of_logits}]
    at_once = math.ceil(rows / use.microbatches) if use.stages > 1 else rows
    passing = {"gathered weights": use.gathered}
    passing["activations"] = activations(facts, at_once * work.longest_prompt, use.share, use.sharers)
    moments: list[Mapping[str, int]] = [passing]
    if phase == "evaluate":
        compared = min(at_once, math.ceil(work.baseline_prompts * together(facts, resources, use) / use.replicas))
        columns = work.longest_prompt + work.new_tokens
        cache = math.ceil(rows * columns * facts.cached * use.caches)
        moments += [{**passing, "logits": compared * of_logits}, {**passing, "keys and values": cache}]
    return moments


def activations(facts: Facts, tokens: float, share: float, sharers: int = 1) -> int:
    """Bytes that a pass over tokens needs at its widest point: inside an MLP, or where experts have their tokens.

    Tokens of all ranks that share experts out come to them unevenly: some rank's are up to twice the mean, as is
    assumed here.
    """
    width, size = facts.anatomy.width, facts.dtype.itemsize
    numbers = 4 * width + 3 * facts.inner * share
    if facts.experts is not None:
        numbers = max(
            numbers,
            3 * width + min(sharers, 2) * facts.experts.per_token * (2 * width + 4 * facts.experts.inner * share),
        )
    return int(tokens * numbers * size)


def _known_prompts(facts: Facts, use: Use) -> float:
    """Bytes of the inputs of blocks, and of keys and values, that are kept of two sets of prompts."""
    work, blocks = facts.work, facts.anatomy.n_blocks
    most = max(_LEAST_KEPT, _SHARE_KEPT * use.held)
    inputs = blocks * facts.anatomy.width * facts.dtype.itemsize
    sets = ((work.baseline_prompts, inputs), (work.target_prompts, inputs + facts.cached * use.caches))
    return sum(min(most, count / use.replicas * work.prompt_tokens * each) for count, each in sets)


def _tables(facts: Facts, use: Use) -> float:
    """Bytes of what edits of outputs need: for each writer [L·R + 1, D], for experts up to a budget."""
    if facts.work.row_norm != "full" or not use.together:
        return 0.0
    each = (facts.anatomy.n_blocks * facts.work.rank + 1) * facts.anatomy.width * 4
    writers = facts.anatomy.writers
    dense, experts = sum(w.experts is None for w in writers), sum(w.experts or 0 for w in writers) / use.sharers
    return (dense * each + min(experts * each, max(_LEAST_TABLES, _SHARE_TABLES * use.held))) / use.stages
