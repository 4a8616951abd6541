"""The placement ``zero3``: every parameter cut over all ranks by DeepSpeed ZeRO-3, gathered for the moment of its use.

Each rank works on prompts of its own, in step with the others, since every one of them takes part in gathering.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch

from heretic_ds.errors import UserError
from heretic_ds.placements.base import Capturing, Placement, runner_of
from heretic_ds.placements.costs import (
    DEEPSPEED,
    ZERO,
    Cost,
    Exchange,
    Facts,
    Resources,
    Use,
    bytes_of,
    estimate,
)
from heretic_ds.placements.deepspeed import check_accelerator, collectives_of_deepspeed, start_deepspeed
from heretic_ds.placements.zero3.offload import check_offload, load_reader
from heretic_ds.placements.zero3.partitions import Partitions, gathered_at_once
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Traits
from heretic_ds.settings import within

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

_TIED_COPIES = 4
"""Of an embedding that is the head, too: gathered for each of its uses, and copied (measured, one model)."""


class Zero3(Placement):
    """Every parameter cut over all ranks by DeepSpeed ZeRO-3, each rank at work on its own prompts."""

    name, phases = "zero3", frozenset({"capture"})
    burden = 5

    @dataclass
    class Options(Placement.Options):
        """Where weights rest, and how much of them is gathered at one time."""

        offload: str = within("none", choices=("none", "cpu", "nvme"))
        """Where the parts of weights that are not in use are kept: ``none`` (on the accelerator), ``cpu`` (host
        memory) or ``nvme`` (files in ``capture.nvme_path``; needs the system library libaio)."""
        nvme_path: Optional[str] = None  # noqa: UP045
        """Folder on a fast local disk for ``capture.offload=nvme``; the files in it are removed after the capture."""
        pin_memory: bool = True
        """Page-locked host memory for an offload: faster transfers, which other programs' memory has to make room
        for."""
        prefetch_bucket_size: int = within(50_000_000, ge=0)
        """Numbers that are gathered ahead of their use (``stage3_prefetch_bucket_size``); 0 switches it off."""
        param_persistence_threshold: int = within(100_000, ge=0)
        """Parameters of at most as many numbers stay gathered (``stage3_param_persistence_threshold``)."""
        max_live_parameters: int = within(1_000_000_000, ge=0)
        """Numbers that may be gathered at one time (``stage3_max_live_parameters``)."""
        max_reuse_distance: int = within(1_000_000_000, ge=0)
        """A parameter used again within as many numbers stays gathered (``stage3_max_reuse_distance``)."""

    options: Options

    def __init__(self, phase: str, options: Options) -> None:
        super().__init__(phase, options)
        if options.offload == "nvme" and options.nvme_path is None:
            raise UserError("capture.offload=nvme needs capture.nvme_path, a folder on a fast local disk")
        if options.offload != "nvme" and options.nvme_path is not None:
            raise UserError("capture.nvme_path is set without capture.offload=nvme, so nothing uses it")

    def check(self, job: Job) -> None:
        """Refuse what ZeRO-3, or this rank's machine, cannot serve."""
        degree, world = self.options.degree, job.world
        if degree not in (None, world.size):
            raise UserError(
                f"capture.degree={degree} with capture=zero3 and {world.size} ranks: zero3 cuts the model over "
                "all ranks; leave capture.degree null"
            )
        job.opened.refuse_quantised(self.phase)
        check_accelerator(job.opened.device, "capture=zero3")
        check_offload(self.options, job.opened.device)

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """Weights on the devices, where there are several, and on the host, where that is another memory."""
        return [{}] * (resources.ranks > 1) + [{"offload": "cpu"}] * (not resources.on_cpu)

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """An equal part of everything, small parameters whole; beside it what is gathered. Every part that runs lets
        another bucket be gathered ahead, up to all that may be live, and a bucket that arrives is copied."""
        options, ranks = self.options, resources.ranks
        facts.refuse_quantised(self.phase)
        parts = facts.once(self.name, lambda: gathered_at_once(facts.model, facts.anatomy))
        largest = facts.once((self.name, "largest"), lambda: max(map(bytes_of, parts)))
        small = options.param_persistence_threshold * facts.dtype.itemsize
        stays = sum(size for size in facts.sizes.values() if size <= small)
        bucket, live = (n * facts.dtype.itemsize for n in (options.prefetch_bucket_size, options.max_live_parameters))
        ahead = min(facts.weights, live) if bucket else 0
        gathered = max(largest, facts.head, ahead) + min(max(bucket, largest), facts.weights)
        gathered += _TIED_COPIES * facts.embedding if facts.tied else 0
        cut = math.ceil(facts.weights / ranks)
        travels = facts.weights * (ranks - 1) / ranks
        exchange = Exchange(ranks, pass_bytes=travels, messages=len(parts), hidden=not resources.on_cpu)
        on_host = options.offload == "cpu"
        use = Use(
            held=stays + (0 if on_host or options.offload == "nvme" else cut),
            replicas=ranks,
            gathered=gathered,
            resting=cut if on_host else 0,
            read_parts=1 / ranks,
            exchanges=(exchange,) if ranks > 1 else (),
            fetched=0 if options.offload == "none" else cut,
            libraries=DEEPSPEED + ZERO,
        )
        return estimate(facts, resources, self.phase, use)

    def build(self, job: Job) -> Capturing:
        """The engine over a model that no rank reads or holds whole.

        Raises UserError, on every rank, where a weight file is at fault on any of them.
        """
        start_deepspeed()
        job.world.agree(lambda: load_reader(self.options), "building the reader")
        comm = Comm.in_lockstep(job.world, job.world.size, collectives_of_deepspeed())

        def load(dtype: torch.dtype) -> Partitions:
            partitions = Partitions(job.opened, dtype, job.anatomy, self.options, job.world)
            try:
                partitions.load()
                comm.agree(lambda: job.opened.check_forward(partitions.model, dtype))
            except BaseException:
                partitions.release()
                raise
            return partitions

        partitions = job.opened.in_some_dtype(load)
        log.info("this rank holds %.1f MiB of weights (zero3)", partitions.bytes_here / 2**20)
        traits = Traits(self.name, rows_move=False, edits=None, retries=False, close=partitions.release)
        return runner_of(job, partitions.model, comm, traits)
