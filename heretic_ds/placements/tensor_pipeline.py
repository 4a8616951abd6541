"""The placement ``tensor_pipeline``: blocks in stages, as under ``pipeline``, and a stage's weights split over ranks of
its own, as under ``tensor_parallel`` with transformers' plan of the family.

Ranks of a stage are consecutive ones, which a node has: between them the outputs of every writer are added up. From
stage to stage goes one hidden state a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint, Shard
from heretic_ds.edits.weights import sum_over
from heretic_ds.errors import UserError
from heretic_ds.placements import tensor_parallel
from heretic_ds.placements.costs import Cost, Facts, Resources, divisors, estimate
from heretic_ds.placements.pipeline import Pipeline, check_blocks
from heretic_ds.placements.pipeline import planned as staged
from heretic_ds.placements.pipeline.line import Line
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.engine import Runner
from heretic_ds.settings import within

if TYPE_CHECKING:
    from heretic_ds.job import Job

_BACKEND = "hf_plan"
"""Who splits the layers. DeepSpeed's AutoTP does not serve a stage without the first blocks, and has collectives over
the whole world, in which the other stages then wait."""


class TensorPipeline(Pipeline):
    """Consecutive blocks on each stage of a replica, every weight split over the ranks of a stage."""

    name = "tensor_pipeline"
    burden = 6

    @dataclass
    class Options(Pipeline.Options):
        """How many ranks hold a stage together, and how many stages there are."""

        tensor_degree: Optional[int] = within(None, ge=2)  # noqa: UP045
        """Ranks over which each weight of a stage is split, best those of a node; null: all ranks of a replica, by
        stages."""
        pipeline_degree: int = within(2, ge=2)
        """Stages of a replica."""

    options: Options

    def check(self, job: Job) -> None:
        """Refuse, before any weight is read, degrees that do not divide and a model that cannot be laid out so."""
        width, phase = self._width(job.world.size), self.phase
        job.world.degree(width * self.options.pipeline_degree, self._product)
        job.opened.refuse_quantised(phase)
        check_blocks(job, self.options.pipeline_degree, f"{phase}.pipeline_degree", phase)
        tensor_parallel.check_split(job.opened.skeleton(), job.anatomy, _BACKEND, width, *self._words)

    def layout(self, ranks: int) -> tuple[type[Pipeline], Pipeline.Options]:
        """As it is, with all degrees as numbers."""
        width = self._width(ranks)
        return type(self), replace(self.options, degree=width * self.options.pipeline_degree, tensor_degree=width)

    @classmethod
    def variants(cls, phase: str, facts: Facts, resources: Resources) -> Sequence[dict[str, Any]]:
        """Stages of at most one computer, as many of them as divide the ranks."""
        widths = [width for width in divisors(resources.ranks) if 2 <= width <= resources.machine.devices_per_node]
        return [
            {"tensor_degree": width, "pipeline_degree": stages}
            for width in widths
            for stages in divisors(resources.ranks // width)
            if 2 <= stages <= facts.anatomy.n_blocks
        ]

    def cost(self, facts: Facts, resources: Resources) -> Cost:
        """Parts of the largest stage: sums over the ranks of a stage, hidden states between stages."""
        width, stages = self._width(resources.ranks), self.options.pipeline_degree
        staged.refuse(facts, stages, f"{self.phase}.pipeline_degree")
        sizes = tensor_parallel.planned.sizes_held(facts, _BACKEND, width, f"{self.phase}.tensor_degree")
        use = self._use(facts, resources, stages, sizes, width)
        exchanges = (*use.exchanges, tensor_parallel.planned.exchange_of(facts, width, stages))
        return estimate(facts, resources, self.phase, replace(use, exchanges=exchanges))

    def build(self, job: Job) -> Runner:
        """The engine over this rank's parts of the blocks of its stage."""
        width, words, options = self._width(job.world.size), self._words, self.options
        mesh = job.world.mesh(width, options.pipeline_degree, self._product)
        near, line = mesh.near, mesh.line
        comm = Comm(mesh.replicas, mesh.replicas.degree, mesh.replicas.inside, world=job.world, near=near.inside)
        if near.inside is None or line is None:
            raise RuntimeError(f"{width} x {options.pipeline_degree} ranks are no grid")

        def split(model: PreTrainedModel, anatomy: Anatomy, here: Checkpoint) -> Mapping[str, Shard]:
            return tensor_parallel.lay_out(model, anatomy, here, near, _BACKEND, *words)[1]

        return self._engine(job, comm, Line(line, comm), split, sum_over(near.inside))

    @property
    def _words(self) -> tuple[str, str]:
        """The setting that splits weights, and what to set where it cannot."""
        return f"{self.phase}.tensor_degree", f"set another {self.phase}.tensor_degree, or {self.phase}=pipeline"

    @property
    def _product(self) -> str:
        return f"{self.phase}.tensor_degree x {self.phase}.pipeline_degree"

    def _width(self, ranks: int) -> int:
        """Ranks of a stage. Raises UserError where the degrees that are given do not go together."""
        options, phase = self.options, self.phase
        degree, stages = options.degree or ranks, options.pipeline_degree
        width = options.tensor_degree or degree // stages
        if options.degree is not None and options.degree != width * stages:
            raise UserError(
                f"{phase}.degree={options.degree} is not {self._product} = {width} x {stages}; leave {phase}.degree "
                "null"
            )
        if width < 2 or (options.tensor_degree is None and degree % stages):
            raise UserError(
                f"{phase}.pipeline_degree={stages} does not leave each stage 2 or more of {degree} ranks, as many as "
                f"any other; set another, or {phase}=pipeline"
            )
        return width
