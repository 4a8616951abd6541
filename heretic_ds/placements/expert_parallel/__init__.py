"""The placement ``expert_parallel``: every rank holds some of the experts and all else, and tokens travel to experts.

The layers of experts are those of DeepSpeed's AutoEP. Each rank works on prompts of its own, in step with the others,
since all of them run the experts that any of them needs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint
from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement, runner_of
from heretic_ds.placements.costs import (
    DEEPSPEED,
    READ_BUFFER,
    Cost,
    Exchange,
    Facts,
    Resources,
    Use,
    bytes_of,
    estimate,
    largest_streamed,
)
from heretic_ds.placements.deepspeed import (
    check_accelerator,
    collectives_of_deepspeed,
    quietly,
    settle_accelerator,
    start_deepspeed,
)
from heretic_ds.placements.expert_parallel.edits import ExpertParallelEdits
from heretic_ds.placements.expert_parallel.layers import ExpertLayers
from heretic_ds.runner import parity
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

_MESSAGES = 6
"""One after another for each block of experts: how many tokens go where, tokens, trials, and answers, each way."""


class ExpertParallel(Placement):
    """Experts shared out over the ranks of a replica by DeepSpeed AutoEP, the rest on every rank, each at work on its
    own prompts."""

    name, phases = "expert_parallel", frozenset({"capture", "evaluate"})
    burden = 4

    @dataclass
    class Options(Placement.Options):
        """Whether the exchange of tokens is checked."""

        parity_check: bool = True
        """Compare the logits of a few tokens with those of the unsplit model, which one rank computes block by block
        while it reads the weights once more."""

    options: Options

    def check(self, job: Job) -> None:
        """Refuse, before any weight is read, a model that configuration and names alone show not to be served."""
        job.opened.refuse_quantised(self.phase)
        check_accelerator(job.opened.device, f"{self.phase}=expert_parallel")
        degree = job.world.degree(self.options.degree, f"{self.phase}.degree")
        ExpertLayers(job.opened.skeleton(), job.anatomy, degree, self.phase, job.opened.device)

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """Every number of ranks that divides theirs, and the experts; where none does, all ranks, which says why."""
        experts, tried = facts.experts, super().variants(phase, facts, resources)
        return [each for each in tried if experts is not None and experts.number % each["degree"] == 0] or tried[-1:]

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """Some of the experts and all else; tokens travel to their experts and back. The comparison with the unsplit
        model reads a whole block."""
        degree = self.options.degree or resources.ranks
        facts.refuse_quantised(self.phase)
        device = torch.device(resources.machine.device)
        experts = facts.experts
        if experts is None:
            kind = facts.model.config.model_type
            raise UserError(f"{self.phase}=expert_parallel: a {kind} model has no experts to share out")
        divides = experts.number % degree == 0  # all such degrees are served, or none
        facts.once((self.name, self.phase, device, divides or degree), lambda: self._refuse(facts, degree, device))
        travels = 2 * experts.per_token * (degree - 1) / degree * facts.anatomy.width * facts.dtype.itemsize
        use = Use(
            held=facts.weights - experts.bytes + experts.bytes // degree,
            replicas=resources.ranks,
            sharers=degree,
            loading=largest_streamed(facts) if self.options.parity_check else READ_BUFFER,
            read_parts=(facts.weights - experts.bytes + experts.bytes / degree) / facts.weights,
            exchanges=(Exchange(degree, token_bytes=travels * experts.blocks, messages=_MESSAGES * experts.blocks),),
            libraries=DEEPSPEED,
        )
        return estimate(facts, resources, self.phase, use)

    def _refuse(self, facts: Facts, degree: int, device: torch.device) -> None:
        settle_accelerator(facts.here)
        with quietly(logging.WARNING):  # of numbers in the configuration that are told apart from themselves
            ExpertLayers(facts.model, facts.anatomy, degree, self.phase, device)

    def build(self, job: Job) -> Runner:
        """The engine over a model whose experts are shared out over the ranks of a replica.

        An edit in the weights is that of a rank's own experts, and of its copy of every other writer. Raises UserError,
        on every rank, where the model cannot be laid out that way.
        """
        world, device, phase = job.world, job.opened.device, self.phase
        replicas = world.replicas(self.options.degree, f"{phase}.degree")
        start_deepspeed()
        comm = Comm.in_lockstep(world, replicas.degree, collectives_of_deepspeed())

        def load(dtype: torch.dtype) -> tuple[PreTrainedModel, Checkpoint, Anatomy]:
            model, checkpoint = world.agree(lambda: job.opened.empty_model(dtype))
            layers = world.agree(lambda: ExpertLayers(model, job.anatomy, replicas.degree, phase, device))
            anatomy = layers.replace(replicas.inside)
            world.agree(lambda: layers.fill(checkpoint, device), "reading the weights")
            comm.agree(lambda: job.opened.check_forward(model, dtype))
            return model, checkpoint, anatomy

        model, checkpoint, anatomy = job.opened.in_some_dtype(load)
        held = bytes_of(model) / 2**20
        log.info("this rank holds %.1f MiB of weights (expert_parallel, %d ranks)", held, replicas.degree)
        if self.options.parity_check:
            what, otherwise = f"{phase}=expert_parallel", f"set {phase}=tensor_parallel"
            skeleton = job.opened.skeleton(model.dtype)
            parity.check_split_model(
                comm,
                model,
                lambda rows: parity.streamed_logits(skeleton, job.anatomy, checkpoint, rows, device),
                what,
                otherwise,
                replicas.member,
                replicas.degree,
            )
        traits = Traits(self.name, rows_move=False, edits=ExpertParallelEdits)
        return runner_of(job, model, comm, traits, anatomy)
