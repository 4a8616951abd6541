"""The placement ``kernel_inject``: DeepSpeed-Inference's fused CUDA kernels in the place of the model's blocks.

Each rank holds the whole model and works on prompts of its own. Edits are made in the weights as the kernels read
them, one at a time.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from heretic_ds.errors import UserError
from heretic_ds.needs import check_deepspeed
from heretic_ds.placements.base import Placement, load_whole, runner_of
from heretic_ds.placements.costs import DEEPSPEED, Cost, Facts, Resources, Use, estimate
from heretic_ds.placements.kernel_inject import op, parity
from heretic_ds.placements.kernel_inject.families import Family, find_family, most_tokens, refuse_long
from heretic_ds.placements.kernel_inject.inject import Injected, inject
from heretic_ds.placements.kernel_inject.workspace import Shape
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from heretic_ds.anatomy import Anatomy
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

_LAUNCHES_A_BLOCK = 16
"""Kernels of one block: some ten of DeepSpeed's and what the adapter adds (read off the sources, not measured)."""


class KernelInject(Placement):
    """DeepSpeed-Inference's fused CUDA kernels in the place of the model's blocks, the whole model on each rank."""

    name, phases = "kernel_inject", frozenset({"evaluate"})
    whole = True
    burden = 8

    def check(self, job: Job) -> None:
        """Refuse what this placement cannot serve, before any weights are loaded. Raises UserError."""
        op.refuse_without_cuda(job.opened.device)
        check_deepspeed(f"{self.phase}=kernel_inject")
        config, name = job.opened.config, f"model.path={job.settings.model.path}"
        family = find_family(config, job.opened.dtypes[0], name)
        longest = max((len(row) for part in job.texts for row in job.prompts(part).rows), default=0)
        new = job.settings.generation.max_new_tokens
        refuse_long(longest + new, most_tokens(config))
        Shape.of(config, config.num_hidden_layers, job.opened.dtypes[0], family.gated).refuse_uncounted(longest, new)

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """All weights on each rank, and a workspace; trials one at a time, a launch or so for each part of a block."""
        work, config = facts.work, facts.model.config
        op.refuse_other_devices(resources.machine.device)
        family = find_family(config, facts.dtype, f"model.path={facts.name}")
        refuse_long(work.longest_prompt + work.new_tokens, most_tokens(config))
        shape = Shape.of(config, facts.anatomy.n_blocks, facts.dtype, family.gated)
        shape.refuse_uncounted(work.longest_prompt, work.new_tokens)
        tokens = shape.tokens_for(work.longest_prompt, work.new_tokens)
        use = Use(
            held=facts.weights,
            replicas=resources.ranks,
            workspace=shape.bytes_for(work.batch, tokens),
            operations=_LAUNCHES_A_BLOCK * facts.anatomy.n_blocks,
            together=False,
            libraries=DEEPSPEED,
        )
        return estimate(facts, resources, self.phase, use)

    def build(self, job: Job) -> Runner:
        """The engine over a model whose blocks are injected kernels, checked against the model as it was before.

        Raises UserError for models that the kernels do not serve, and where the check fails.
        """
        world = job.world
        torch.cuda.set_device(job.opened.device)  # the kernels run on the current device
        world.agree(op.load_kernels, "building the kernels")
        model = load_whole(job).model
        family = find_family(model.config, model.dtype, f"model.path={job.settings.model.path}")
        injected = world.agree(lambda: inject_checked(model, job.anatomy, family))
        comm = Comm.of_replicas(world, 1, f"{self.phase}.degree")
        return runner_of(job, model, comm, traits_of(injected), injected.anatomy)


def traits_of(injected: Injected) -> Traits:
    """Passes go through injected kernels, whose workspace has to know beforehand how long answers get."""
    decoding, close = injected.adapter.expecting, injected.close
    return Traits(KernelInject.name, rows_move=False, edits=None, decoding=decoding, close=close)


def inject_checked(model: PreTrainedModel, anatomy: Anatomy, family: Family) -> Injected:
    """Inject, and refuse to go on where the model then computes something else. Raises UserError."""
    expected = parity.sample(model)
    injected = inject(model, anatomy, family, model.dtype)
    try:
        parity.check(model, injected.adapter, expected)
    except UserError:
        injected.close()
        raise
    return injected
