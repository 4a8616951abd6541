"""The placement ``pipeline``: each rank of a replica holds some consecutive blocks, and rows pass through them in turn.

A rank reads its own blocks from the weight files and no others; between ranks travel the hidden states of a pass, once
for each boundary, and the tokens that were chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

import torch
from transformers import PreTrainedModel

from heretic_ds.ablation import Reduce
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint, Shard, fill
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.placements.base import Placement, runner_of
from heretic_ds.placements.costs import READ_BUFFER, Cost, Facts, Resources, Use, bytes_of, estimate, largest_streamed
from heretic_ds.placements.pipeline import planned, structure
from heretic_ds.placements.pipeline.line import Line
from heretic_ds.placements.pipeline.parity import check_stages
from heretic_ds.placements.pipeline.partition import stages_of
from heretic_ds.placements.pipeline.stage import Stage, StagedForward, connect, head_path, keep_stage
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner, Traits
from heretic_ds.settings import within

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

Split = Callable[[PreTrainedModel, Anatomy, Checkpoint], Mapping[str, Shard]]
"""Lays out what is here of an empty model once more, over some ranks, and says which parts are this rank's."""


def _whole(model: PreTrainedModel, anatomy: Anatomy, checkpoint: Checkpoint) -> Mapping[str, Shard]:
    return {}


class Pipeline(Placement):
    """Consecutive blocks on each rank of a replica, through which rows pass in turn; replicas share the prompts."""

    name, phases = "pipeline", frozenset({"capture", "evaluate"})
    burden = 2

    @dataclass
    class Options(Placement.Options):
        """How many parts of a batch are under way, and whether the model in stages is checked."""

        microbatches: Optional[int] = within(None, ge=1)  # noqa: UP045
        """Parts of a batch that are under way side by side, each in another stage; null: as many as stages."""
        parity_check: bool = True
        """Compare the logits of a few tokens, and of a step after them, with those of the whole model, which one rank
        computes block by block while it reads the weights once more."""

    options: Options

    def check(self, job: Job) -> None:
        """Refuse, before any weight is read, a model whose blocks cannot lie on different ranks."""
        degree = job.world.degree(self.options.degree, f"{self.phase}.degree")
        job.opened.refuse_quantised(self.phase)
        if degree > 1:
            check_blocks(job, degree, f"{self.phase}.degree", self.phase)

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """Every number of stages that divides the ranks, up to one a block."""
        tried = super().variants(phase, facts, resources)
        return [options for options in tried if options["degree"] <= facts.anatomy.n_blocks]

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """The largest stage. A hidden state goes from stage to stage, a token back, for each part of a batch."""
        stages = self.options.degree or resources.ranks
        planned.refuse(facts, stages, f"{self.phase}.degree")
        return estimate(facts, resources, self.phase, self._use(facts, resources, stages, facts.sizes))

    def _use(self, facts: Facts, resources: Resources, stages: int, sizes: Mapping[str, int], width: int = 1) -> Use:
        """How a rank is used, of ``width`` in each stage, that holds so much of each parameter."""
        facts.refuse_quantised(self.phase)
        parts = facts.once(("held by block", width), lambda: planned.held_by_block(facts, sizes))
        held, blocks = planned.fullest_stage(facts, stages, parts)
        return Use(
            held=held,
            replicas=resources.ranks // (stages * width),
            share=1 / width,
            stages=stages,
            microbatches=self.options.microbatches or stages,
            caches=blocks / facts.anatomy.n_blocks / (width if facts.caches_heads else 1),
            loading=largest_streamed(facts) if self.options.parity_check else READ_BUFFER,
            read_parts=held / facts.weights,
            exchanges=planned.between_stages(facts, stages, stages * width),
        )

    def build(self, job: Job) -> Runner:
        """The engine over this rank's blocks. Raises UserError, on every rank, where the model does not allow it."""
        comm = Comm.of_replicas(job.world, self.options.degree, f"{self.phase}.degree")
        line = None if comm.partners is None else Line(comm.partners, comm)
        return self._engine(job, comm, line)

    def _engine(
        self, job: Job, comm: Comm, line: Line | None, split: Split = _whole, reduce: Reduce | None = None
    ) -> Runner:
        """The engine over the blocks that are here: all of them without a ``line``.

        ``split`` lays these out over ranks that hold them together, ``reduce`` adds up over those.
        """
        world, phase, options = job.world, self.phase, self.options
        tuples = line is not None and world.agree(lambda: tuples_of(job, phase))

        def load(dtype: torch.dtype) -> tuple[PreTrainedModel, Checkpoint, Stage]:
            model, checkpoint = world.agree(lambda: job.opened.empty_model(dtype))
            stage, here = _keep(model, job.anatomy, checkpoint, line, tuples)
            shards = world.agree(lambda: split(model, stage.anatomy(job.anatomy), here))
            world.agree(lambda: fill(model, here, shards, job.opened.device), "reading the weights")
            comm.agree(lambda: job.opened.check_forward(model, dtype))
            return model, checkpoint, stage

        model, checkpoint, stage = job.opened.in_some_dtype(load)
        held = bytes_of(model) / 2**20
        told = "this rank holds the blocks %d to %d of %d: %.1f MiB of weights, with all that is beside them"
        log.info(told, stage.blocks.start, stage.blocks.stop - 1, stage.total, held)
        if line is None:
            engine = runner_of(job, model, comm, Traits(self.name))
            engine.whole = job.opened.loaded(model)
            return engine
        anatomy, count = stage.anatomy(job.anatomy), options.microbatches or line.stages
        make = partial(StagedForward, stage=stage, line=line, microbatches=count)
        if options.parity_check:
            check_stages(job, comm, make(model, anatomy, 0, False, comm), checkpoint, f"{phase}={self.name}", phase)
        traits = Traits(self.name, slots=False, forward=make, close=line.settle)
        return runner_of(job, model, comm, traits, anatomy, WeightEditor(model, anatomy, reduce))


def check_blocks(job: Job, stages: int, setting: str, phase: str) -> None:
    """Refuse a model that has fewer blocks than ``setting`` asks for stages, or whose blocks need each other."""
    if stages > job.anatomy.n_blocks:
        raise UserError(
            f"{setting}={stages} asks for more stages than this model's {job.anatomy.n_blocks} blocks; "
            f"set {setting} to at most {job.anatomy.n_blocks}"
        )
    tuples_of(job, phase)


def tuples_of(job: Job, phase: str) -> bool:
    """Whether blocks of the job's model give tuples. Raises UserError where they cannot lie on different ranks."""
    with _advising(job, phase):
        return structure.outputs_are_tuples(job.opened.skeleton(), job.anatomy)


@contextmanager
def _advising(job: Job, phase: str) -> Iterator[None]:
    try:
        yield
    except structure.CannotStage as error:
        raise UserError(
            f"the blocks of this {job.opened.config.model_type} model cannot lie on different ranks: {error}; "
            f"set {phase}=tensor_parallel or {phase}=replicated"
        ) from error


def _keep(
    model: PreTrainedModel, anatomy: Anatomy, checkpoint: Checkpoint, line: Line | None, tuples: bool
) -> tuple[Stage, Checkpoint]:
    """Leave of an empty model this rank's stage, connected to its neighbours; also what of its state is here."""
    if line is None:
        return Stage(range(anatomy.n_blocks), anatomy.n_blocks, tuples), checkpoint
    blocks = stages_of(anatomy, checkpoint, head_path(model), line.stages)[line.stage]
    stage = Stage(blocks, anatomy.n_blocks, tuples)
    keep_stage(model, anatomy, stage)
    connect(model, anatomy, stage, line)
    shapes = {name: checkpoint.shapes[name] for name in model.state_dict()}
    return stage, replace(checkpoint, shapes=shapes)
