"""The placement ``zero3``: every parameter cut over all ranks by DeepSpeed ZeRO-3, gathered for the moment of its use.

Each rank works on prompts of its own. All ranks have to run equally many forward passes, since every one of them
gathers: shares are padded to one length, batches have one size, and answers are decoded in step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Anatomy
from heretic_ds.engines.capture import tapped
from heretic_ds.engines.decoding import decode
from heretic_ds.engines.deepspeed_start import quietly, start_deepspeed
from heretic_ds.engines.headroom import rows_that_fit
from heretic_ds.engines.memory import is_out_of_memory
from heretic_ds.engines.offload import check_offload
from heretic_ds.engines.protocol import Ablation, Decided, TokenRows
from heretic_ds.engines.resident import ResidentEngine
from heretic_ds.engines.weights import WeightEditor
from heretic_ds.engines.zero3_partitions import Partitions
from heretic_ds.errors import UserError
from heretic_ds.model_fitness import dtype_name, forward_problem
from heretic_ds.settings import CaptureSettings
from heretic_ds.world import World

if TYPE_CHECKING:
    from heretic_ds.job import Job
    from heretic_ds.loading import OpenedModel

log = logging.getLogger(__name__)

_NO_EDITS = "weights that zero3 has cut into parts cannot be edited; choose another placement for evaluate"


def build(job: Job, placement: CaptureSettings, phase: str) -> Zero3Engine:
    """The engine over a model that no rank reads or holds whole; :func:`check` has to have accepted it.

    Raises UserError, on every rank, where a weight file is at fault on any of them.
    """
    start_deepspeed()
    return Zero3Engine(_in_some_dtype(job.opened, job.anatomy, placement, job.world), job)


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
    if opened.quantization is not None:
        raise UserError(
            f"model.path={opened.settings.path} is quantised with {opened.quantization}, and its parts cannot be read "
            "by themselves; use the unquantised original, or set capture=replicated"
        )
    _check_accelerator(opened.device)
    check_offload(placement, opened.device)


def _check_accelerator(device: torch.device) -> None:
    """DeepSpeed settles at its import on one kind of device for the whole process."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with quietly():
        from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise UserError(
            f"model.device={device.type}, but DeepSpeed runs on {get_accelerator().device_name()} here; "
            f"set DS_ACCELERATOR={device.type} in the environment, or model.device=auto"
        )


def _in_some_dtype(opened: OpenedModel, anatomy: Anatomy, capture: CaptureSettings, world: World) -> Partitions:
    """The model in the first dtype whose weights and first forward are finite."""
    problem = ""
    for dtype in opened.dtypes:
        if problem:
            log.warning("%s; loading it in %s instead", problem, dtype_name(dtype))
        partitions = Partitions(opened, dtype, anatomy, capture, world)
        try:
            partitions.load()
        except UserError as error:
            partitions.release()
            if dtype == opened.dtypes[-1]:
                raise
            problem = str(error)
            continue
        found = forward_problem(partitions.model)
        if found is None:
            log.info("this rank holds %.1f MiB of weights (zero3)", partitions.bytes_here / 2**20)
            return partitions
        partitions.release()
        problem = f"a first forward of {opened.settings.path} in {dtype_name(dtype)} {found}"
    raise UserError(f"{problem}; set another model.dtype (float32 is the safest)")


class _NoEditor(WeightEditor):
    """Partitioned weights are only read."""

    def prepare(self, ablation: Ablation) -> None:
        raise UserError(_NO_EDITS)

    def wear(self, edit: Edit | None) -> None:
        if edit is not None:
            raise UserError(_NO_EDITS)


class Zero3Engine(ResidentEngine):
    """Captures residuals and generates with the original weights; edits are refused."""

    max_edits_per_pass = 0

    def __init__(self, partitions: Partitions, job: Job) -> None:
        generation, world = job.settings.generation, job.world
        super().__init__(
            partitions.model,
            job.opened.tokenizer,
            job.anatomy,
            generation.max_new_tokens,
            generation.batch_size,
            editor=_NoEditor(partitions.model, job.anatomy),
            replicas=world.replicas(1, "capture.degree"),  # of the prompts: every rank has its own
            same=world.same,
        )
        self.partitions, self._world = partitions, world

    @property
    def degree(self) -> int:
        return self._world.size

    def close(self) -> None:
        del self.model, self._editor
        self.partitions.release()

    def _residuals(self, decoder: nn.Module, rows: TokenRows) -> Tensor:
        with tapped(self.model, self.anatomy) as taps, self._in_step(rows):
            self._first_token_logits(rows)  # DeepSpeed counts forward passes of the whole model
            return taps.take()

    def _decode(self, rows: TokenRows, max_new_tokens: int, decided: Decided | None) -> list[list[int]]:
        with self._in_step(rows):
            return decode(self.model, rows, self._pad_id, self._ends, max_new_tokens, decided, self._anyone)

    def _anyone(self, going: bool) -> bool:
        """Whether any rank's rows go on."""
        return self._replicas.total(torch.tensor(float(going))).item() > 0

    @contextmanager
    def _in_step(self, rows: Sequence[Any]) -> Iterator[None]:
        """A rank that ran out of memory cannot try again by itself: the others wait for its part of the weights."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"memory ran out with {len(rows)} rows in a batch, from which zero3 cannot recover; "
                f"set generation.batch_size below {len(rows)}"
            ) from error

    def _most_rows(self, longest: TokenRows, work: Callable[[TokenRows], Any]) -> int:
        most = super()._most_rows(longest, work)
        fitting = rows_that_fit(lambda n: work(longest[:n]), most, next(self.model.parameters()).device)
        return min(self._world.gather(fitting))
