"""What an edited model is written from where weights were packed in few bits while edits were searched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heretic_ds.ablation import Edit
from heretic_ds.anatomy import Writer
from heretic_ds.checkpoint import bnb
from heretic_ds.checkpoint.open import LoadedModel, load_weights
from heretic_ds.edits.adapters import ReadWriter
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.export.adapter import resident_writer, stored_writer
from heretic_ds.export.streaming import EditedFiles, stored_pieces

if TYPE_CHECKING:
    from heretic_ds.stages.opening import Run


def is_packed(run: Run) -> bool:
    """Whether the run holds weights in few bits: any, for not every model has some that can be."""
    return bool(run.job.packed)


def how_edited(run: Run) -> str:
    """On what an edit is verified, after a verb: ``on edited weights``."""
    job = run.job
    if not job.packed:
        return "on edited weights"
    of_outputs = any(writer.module in job.packed for writer in job.anatomy.writers)
    return f"on edited {'outputs' if of_outputs else 'weights'}, {bnb.in_words(job.held_as)}"


def from_files(run: Run) -> bool:
    """Whether an export is made of the original's files, tensor by tensor, and not of the model in memory."""
    if run.engine.whole is None:
        return True
    if not is_packed(run) or not _files_tell(run):
        return False
    checkpoint = run.job.opened.empty_model(run.engine.dtype)[1]
    return all(stored_pieces(checkpoint, writer) for writer in run.job.anatomy.writers)


def _files_tell(run: Run) -> bool:
    """Whether the files tell which way each matrix lies: whoever packs one that lies input first turns it."""
    turned = any(writer.layout == "KD" for writer in run.job.anatomy.writers)
    return run.job.opened.quantization is None or not turned


def what_to_write(run: Run, edit: Edit) -> tuple[LoadedModel, EditedFiles | None]:
    """The edited model, and its weight files where they are not to be written from memory.

    A model that lies whole in memory, its weights edited, is written as it is; one whose weights are packed is made of
    the original's files, or, where tensors there cannot be edited one by one, is loaded without packing on rank 0 and
    edited.
    """
    world, job, dtype, whole = run.world, run.job, run.engine.dtype, run.engine.whole
    if whole is not None and not is_packed(run):
        return whole, None
    if run.settings.export.format == "adapter":
        return job.opened.loaded(job.opened.skeleton(dtype), dtype), None
    if from_files(run):
        size = run.settings.export.max_shard_size
        return world.agree(partial(EditedFiles.plan, job.opened, job.anatomy, run.ablation, edit, dtype, size))
    made = [job.opened.loaded(job.opened.skeleton(dtype), dtype)]
    world.decide(lambda: made.append(_unpacked(run, edit)), "loading the weights without packing")
    return made[-1], None


def _unpacked(run: Run, edit: Edit) -> LoadedModel:
    """The model of the original's files, not packed, on the host and edited."""
    opened, cpu = run.job.opened, torch.device("cpu")
    dtype = str(run.engine.dtype).removeprefix("torch.")
    choice = replace(opened.choice, quantization=bnb.NONE, dtype=dtype, device=cpu.type)
    loaded = load_weights(replace(opened, choice=choice, device=cpu))
    editor = WeightEditor(loaded.model, run.job.anatomy)
    editor.prepare(run.ablation)
    editor.set_edit(edit)
    return loaded


def reader_of_writers(run: Run, whole: LoadedModel) -> ReadWriter:
    """What gives the numbers that an adapter is for: those of the original's files, or of the model in memory.

    Files are read whatever form they have a writer in, for none is written here.
    """
    if run.engine.whole is None or (is_packed(run) and _files_tell(run)):
        return partial(stored_writer, run.job.opened.empty_model(run.engine.dtype)[1])
    if not is_packed(run):
        return partial(resident_writer, whole.model)

    def read(writer: Writer) -> tuple[Tensor, Tensor | None]:
        weight_DK, gain_D = resident_writer(whole.model, writer)
        return weight_DK.to(run.engine.dtype), gain_D

    return read
