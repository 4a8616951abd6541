"""The placement ``fsdp``: every parameter cut over all ranks by PyTorch's FSDP2, and gathered block by block.

Each rank works on prompts of its own, in step with the others, since every one of them takes part in gathering.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement, runner_of
from heretic_ds.placements.costs import FSDP, Cost, Exchange, Facts, Resources, Use, estimate
from heretic_ds.placements.fsdp.edits import GatheredOutputEdits, GatheringEditor
from heretic_ds.placements.fsdp.units import Units, bytes_cut
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits
from heretic_ds.settings import within

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

_UNITS_GATHERED = 3
"""Of the largest unit's size: that which runs, the next one, and the memory that ranks' parts arrive in."""


class Fsdp(Placement):
    """Every parameter cut over all ranks by PyTorch FSDP2 and gathered block by block, each rank at work on its own
    prompts."""

    name, phases = "fsdp", frozenset({"capture", "evaluate"})
    burden = 3

    @dataclass
    class Options(Placement.Options):
        """Where weights rest."""

        offload: str = within("none", choices=("none", "cpu"))
        """Where the parts of blocks that are not in use are kept: ``none`` (on the accelerator) or ``cpu`` (host
        memory)."""
        pin_memory: bool = True
        """Page-locked host memory for an offload: faster transfers, which other programs' memory has to make room
        for."""

    options: Options

    def check(self, job: Job) -> None:
        """Refuse what FSDP, or this rank's machine, cannot serve."""
        phase, degree, ranks = self.phase, self.options.degree, job.world.size
        if ranks == 1:
            raise UserError(
                f"{phase}=fsdp cuts the model over ranks, but there is only one; start several with the launcher, or "
                f"set {phase}=replicated"
            )
        if degree not in (None, ranks):
            raise UserError(
                f"{phase}.degree={degree} with {phase}=fsdp and {ranks} ranks: fsdp cuts the model over all ranks; "
                f"leave {phase}.degree null"
            )
        job.opened.refuse_quantised(phase)
        if self.options.offload == "cpu" and job.opened.device.type == "cpu":
            raise UserError(
                f"{phase}.offload=cpu keeps weights in host memory, where they lie anyway when the model runs on the "
                f"CPU; set {phase}.offload=none"
            )

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """Over all ranks; to capture also with blocks on the host, where that is another memory. Each token of an
        answer would fetch them all."""
        several = resources.ranks > 1
        return [{}] * several + [{"offload": "cpu"}] * (several and phase == "capture" and not resources.on_cpu)

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """An equal part of everything, and some units that are gathered: that of the running block, of the next, and
        what they are gathered into. An embedding that is the head, too, is in two units."""
        ranks, on_host = resources.ranks, self.options.offload == "cpu"
        facts.refuse_quantised(self.phase)
        cut = facts.once((self.name, ranks), lambda: bytes_cut(facts.model, ranks))
        of_blocks = math.ceil(cut * sum(facts.blocks) / facts.weights) if on_host else 0
        travels = facts.weights * (ranks - 1) / ranks
        units, twice = facts.anatomy.n_blocks + 3, facts.embedding if facts.tied else 0
        use = Use(
            held=cut - of_blocks,
            replicas=ranks,
            gathered=_UNITS_GATHERED * max(*facts.blocks, facts.embedding, facts.head) + twice,
            resting=of_blocks,
            read_parts=1 / ranks,
            exchanges=(Exchange(ranks, pass_bytes=travels, messages=units, hidden=not resources.on_cpu),),
            fetched=of_blocks,
            libraries=FSDP,
        )
        return estimate(facts, resources, self.phase, use)

    def build(self, job: Job) -> Runner:
        """The engine over a model that no rank reads or holds whole.

        Raises UserError, on every rank, where a weight file is at fault on any of them, or the model uses weights
        outside of the module that has them.
        """
        world, device, options = job.world, job.opened.device, self.options
        comm = Comm.in_lockstep(world, world.size)

        def load(dtype: torch.dtype) -> Units:
            model, checkpoint = world.agree(lambda: job.opened.empty_model(dtype))
            rests_on_host = options.offload == "cpu"
            units = Units(model, checkpoint, job.anatomy, world, device, rests_on_host, options.pin_memory)
            try:
                world.agree(units.read, "reading the weights")
                comm.agree(lambda: job.opened.check_forward(model, dtype))
            except BaseException as error:
                units.release()
                # DTensor is the type of parameters that nobody has gathered.
                if isinstance(error, UserError) and "DTensor" in str(error):
                    raise UserError(
                        f"{self.phase}=fsdp gathers weights for the module that has them, but others of this "
                        f"{model.config.model_type} model use them, too; set {self.phase}=replicated or tensor_parallel"
                    ) from error
                raise
            return units

        units = job.opened.in_some_dtype(load)
        log.info("this rank holds %.1f MiB of weights (fsdp)", units.bytes_here / 2**20)
        traits = Traits(self.name, rows_move=False, edits=GatheredOutputEdits, close=units.release)
        return runner_of(job, units.model, comm, traits, editor=GatheringEditor(units, job.anatomy))
