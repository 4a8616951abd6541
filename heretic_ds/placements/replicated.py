"""The placement ``replicated``: the whole model on every rank's device, each rank at work on its own prompts."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from heretic_ds.anatomy import packed_modules
from heretic_ds.placements.base import Placement, load_whole, runner_of
from heretic_ds.placements.costs import BLOCKS_MERGED, MERGING, READ_BUFFER, Cost, Facts, Resources, Use, estimate
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)


class Replicated(Placement):
    """The whole model on every rank's device, each rank at work on its own prompts."""

    name, phases = "replicated", frozenset({"capture", "evaluate"})
    whole = graphs = resident = packs = True
    burden = 0

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """All weights on each rank, which transformers reads: on a CPU with a copy of experts that it puts together,
        on another device with some blocks at a time. Ranks that share the reading need neither."""
        here = min(resources.ranks, resources.machine.devices_per_node)
        shared = facts.shares_files and here > 1 and facts.in_parts and not facts.packed
        merging = READ_BUFFER
        unpacked = facts.quantization is not None and facts.in_parts  # read by parts, whoever does
        if facts.merges_experts and not shared and not unpacked:
            merging += math.ceil(MERGING * facts.weights) if resources.on_cpu else BLOCKS_MERGED * max(facts.blocks)
        use = Use(
            held=facts.held,
            gathered=max(facts.packed.values(), default=0),  # a packed matrix is unpacked for its product
            replicas=resources.ranks,
            loading=merging,
            read_parts=1 / here if shared else 1.0,
            graphs=self.graphs and not resources.on_cpu and facts.experts is None and not facts.packed,
            reuses=True,
        )
        return estimate(facts, resources, self.phase, use)

    def build(self, job: Job) -> Runner:
        """The engine over a model that is loaded whole onto its device."""
        comm = Comm.of_replicas(job.world, 1, f"{self.phase}.degree")
        loaded = load_whole(job)
        packed = any(packed_modules(loaded.model))
        if packed and job.settings.generation.cuda_graphs and job.opened.device.type == "cuda":
            log.info("decoding without CUDA graphs: weights are packed in few bits")
        engine = runner_of(job, loaded.model, comm, Traits(self.name, graphs=self.graphs and not packed))
        engine.whole = loaded
        return engine
