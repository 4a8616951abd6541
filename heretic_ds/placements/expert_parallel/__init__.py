"""The placement ``expert_parallel``: every rank holds some of the experts and all else, and tokens travel to experts.

The layers of experts are those of DeepSpeed's AutoEP. Each rank works on prompts of its own, in step with the others,
since all of them run the experts that any of them needs.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from heretic_ds.ablation import Ablation
from heretic_ds.anatomy import Anatomy
from heretic_ds.checkpoint import Checkpoint
from heretic_ds.checkpoint.dtypes import in_some_dtype
from heretic_ds.checkpoint.from_files import closed_on_error, empty_model, refuse_quantised
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.placements.deepspeed import check_accelerator
from heretic_ds.placements.expert_parallel.edits import ExpertParallelEdits
from heretic_ds.placements.expert_parallel.layers import ExpertLayers
from heretic_ds.runner import parity
from heretic_ds.runner.engine import MOST_EDITS
from heretic_ds.runner.in_step import InStepEngine
from heretic_ds.settings import PlacementSettings

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)


def build(job: Job, placement: PlacementSettings, phase: str) -> ExpertParallelEngine:
    """The engine over a model whose experts are shared out over the ranks of a replica.

    An edit in the weights is that of a rank's own experts, and of its copy of every other writer. Raises UserError, on
    every rank, where the model cannot be laid out that way.
    """
    world, device = job.world, job.opened.device
    replicas = world.replicas(placement.degree, f"{phase}.degree")

    def load(dtype: torch.dtype) -> tuple[PreTrainedModel, Checkpoint, Anatomy]:
        model, checkpoint = world.agree(lambda: empty_model(job.opened, dtype))
        with closed_on_error(checkpoint):
            layers = world.agree(lambda: ExpertLayers(model, job.anatomy, replicas.degree, phase, device))
            anatomy = layers.replace(replicas.inside)
            world.agree(lambda: layers.fill(checkpoint, device))
        return model, checkpoint, anatomy

    model, checkpoint, anatomy = in_some_dtype(
        job.opened, world, load, lambda loaded: loaded[0], lambda loaded: loaded[1].files.close()
    )
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    log.info("this rank holds %.1f MiB of weights (expert_parallel, %d ranks)", held / 2**20, replicas.degree)
    if placement.parity_check:
        what, otherwise = f"{phase}=expert_parallel", f"set {phase}=tensor_parallel"
        parity.check_split_model(job, model, checkpoint, what, otherwise, replicas.member, replicas.degree)
    checkpoint.files.close()
    return ExpertParallelEngine("expert_parallel", model, anatomy, job, replicas.degree, WeightEditor(model, anatomy))


def check(job: Job, placement: PlacementSettings, phase: str) -> None:
    """Refuse, before any weight is read, a model that configuration and names alone show not to be served."""
    refuse_quantised(job.opened, phase)
    check_accelerator(job.opened.device)
    degree = job.world.degree(placement.degree, f"{phase}.degree")
    ExpertLayers(job.opened.skeleton(), job.anatomy, degree, phase, job.opened.device)


class ExpertParallelEngine(InStepEngine):
    """Rows of one batch may belong to different trials, whose edits experts make for the tokens of all ranks."""

    max_edits_per_pass = MOST_EDITS

    def prepare(self, ablation: Ablation) -> None:
        super().prepare(ablation)
        outputs = ExpertParallelEdits(self.model, self.anatomy, ablation, budget=self._table_budget())
        self._outputs, self.max_edits_per_pass = outputs, min(MOST_EDITS, outputs.most_edits)
