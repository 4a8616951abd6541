"""What is to be known of a model in a placement, and what a user chooses, for an engine to run it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from heretic_ds.anatomy import Anatomy
from heretic_ds.edits.outputs import OutputEdits
from heretic_ds.runner.comm import Comm
from heretic_ds.runner.reuse import Reuse


@dataclass(frozen=True)
class Traits:
    """What is true of a model in one placement."""

    name: str = "replicated"
    """The placement's."""
    rows_move: bool = True
    """Rows may come and go in a batch, and batches be of any size."""
    slots: bool = True
    """Rows that move may lie in slots while they are answered."""
    forward: Callable[[PreTrainedModel, Anatomy, int, bool, Comm], Reuse] = Reuse
    """What passes are made by."""
    edits: type[OutputEdits] | None = OutputEdits
    """How outputs are edited, many trials in a pass; None where they cannot be."""
    retries: bool = True
    """A pass in which memory ran out can be tried again with fewer rows."""
    graphs: bool = False
    """Steps of decoding may be captured: no rank waits for another within them."""
    decoding: Callable[[int], AbstractContextManager[Any]] = nullcontext
    """A context for answers of at most so many tokens."""
    close: Callable[[], object] = lambda: None
    """What is to be given back with the model."""


@dataclass(frozen=True)
class RunnerOptions:
    """What a user chooses of how passes are run."""

    max_new_tokens: int = 100
    """Longest answer."""
    batch_size: int = 0
    """Rows per batch; 0: measured."""
    cuda_graphs: bool = False
    """Capture steps of decoding where placement, device and model allow it."""
    prefill_reuse: bool = False
    """Passes of edited models over prompts leave out what is the original's, where placement and model allow it."""
