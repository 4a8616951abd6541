"""The placement ``zero3``: every parameter cut over all ranks by DeepSpeed ZeRO-3, gathered for the moment of its use.

Each rank works on prompts of its own, in step with the others, since every one of them takes part in gathering.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.checkpoint.dtypes import in_some_dtype
from heretic_ds.checkpoint.from_files import refuse_quantised
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.errors import UserError
from heretic_ds.placements.deepspeed import check_accelerator, start_deepspeed
from heretic_ds.placements.zero3.offload import check_offload, load_reader
from heretic_ds.placements.zero3.partitions import Partitions
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.in_step import InStepEngine
from heretic_ds.runner.taps import tapped
from heretic_ds.settings import CaptureSettings

if TYPE_CHECKING:
    from heretic_ds.job import Job

log = logging.getLogger(__name__)

_NO_EDITS = "weights that zero3 has cut into parts cannot be edited; choose another placement for evaluate"


def build(job: Job, placement: CaptureSettings, phase: str) -> Zero3Engine:
    """The engine over a model that no rank reads or holds whole; :func:`check` has to have accepted it.

    Raises UserError, on every rank, where a weight file is at fault on any of them.
    """
    start_deepspeed()
    job.world.agree(lambda: load_reader(placement))

    def load(dtype: torch.dtype) -> Partitions:
        partitions = Partitions(job.opened, dtype, job.anatomy, placement, job.world)
        try:
            partitions.load()
        except UserError:
            partitions.release()
            raise
        return partitions

    partitions = in_some_dtype(job.opened, job.world, load, lambda loaded: loaded.model, Partitions.release)
    log.info("this rank holds %.1f MiB of weights (zero3)", partitions.bytes_here / 2**20)
    return Zero3Engine(partitions, job)


def check(job: Job, placement: CaptureSettings, phase: str) -> None:
    """Refuse, before any weight is read, what this placement or this rank's machine cannot serve."""
    world, opened = job.world, job.opened
    if phase != "capture":
        raise UserError(f"{phase}=zero3: {_NO_EDITS}")
    if placement.degree not in (None, world.size):
        raise UserError(
            f"capture.degree={placement.degree} with capture=zero3 and {world.size} ranks: zero3 cuts the model over "
            "all ranks; leave capture.degree null"
        )
    refuse_quantised(opened, phase)
    check_accelerator(opened.device)
    check_offload(placement, opened.device)


class _NoEditor(WeightEditor):
    """Partitioned weights are only read."""

    def prepare(self, ablation: Ablation) -> None:
        raise UserError(_NO_EDITS)

    def set_edit(self, edit: Edit | None) -> None:
        if edit is not None:
            raise UserError(_NO_EDITS)


class Zero3Engine(InStepEngine):
    """Captures residuals and generates with the original weights; edits are refused."""

    max_edits_per_pass = 0

    def __init__(self, partitions: Partitions, job: Job) -> None:
        editor = _NoEditor(partitions.model, job.anatomy)
        super().__init__("zero3", partitions.model, job.anatomy, job, job.world.size, editor)
        self.partitions = partitions

    def close(self) -> None:
        del self.model, self._editor
        self.partitions.release()

    def _residuals(self, decoder: nn.Module, rows: TokenRows) -> Tensor:
        with tapped(self.model, self.anatomy) as taps:
            self._first_token_logits(rows)  # DeepSpeed counts forward passes of the whole model
            return taps.take()
