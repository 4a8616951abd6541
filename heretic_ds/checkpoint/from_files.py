"""What placements share that read parts of weights straight from the checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from heretic_ds.checkpoint import Checkpoint, TensorFiles
from heretic_ds.checkpoint.open import OpenedModel
from heretic_ds.errors import UserError


def refuse_quantised(opened: OpenedModel, phase: str) -> None:
    """Refuse a checkpoint whose parts mean nothing by themselves. Raises UserError."""
    if opened.quantization is not None:
        raise UserError(
            f"model.path={opened.choice.path} is quantised with {opened.quantization}, and its parts cannot be read "
            f"by themselves; use the unquantised original, or set {phase}=replicated"
        )


@contextmanager
def closed_on_error(checkpoint: Checkpoint) -> Iterator[None]:
    """Close the files of a checkpoint that turns out not to be of use."""
    try:
        yield
    except UserError:
        checkpoint.files.close()
        raise


def empty_model(opened: OpenedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, Checkpoint]:
    """The model without weights, and where they are."""
    model = opened.skeleton(dtype)
    files = TensorFiles(opened.source.folder, opened.headers)
    return model, Checkpoint.of(model, files, dtype)
