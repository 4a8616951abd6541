"""What every placement offers, whatever lies behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.checkpoint.open import LoadedModel
from heretic_ds.job import Job
from heretic_ds.prompts import TokenRows
from heretic_ds.runner.engine import RunnerOptions
from heretic_ds.scoring.base import Decided, ReadLogits


class Engine(Protocol):
    """One model on its devices.

    ``distributions`` and ``generate`` take up to ``max_edits_per_pass`` edits at once and leave the weights as they
    found them, as far as a caller can tell; ``apply`` edits the weights themselves until ``restore``. An edit of None
    stands for the weights as they are.
    """

    max_edits_per_pass: int
    whole: LoadedModel | None
    """The model where it lies whole in this process, so that it can be written or talked to; else None."""
    batch_sizes: dict[str, int]
    """Rows per batch by phase (``capture``, ``kl``, ``generate``), as set, measured, or halved for want of memory."""

    @property
    def degree(self) -> int:
        """Ranks that hold one replica of the model together."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as loaded."""
        ...

    def capture(self, prompts: TokenRows, winsorize_quantile: float = 1.0) -> Tensor:
        """Mean residuals [L+1, D], float64, at the last position of each prompt."""
        ...

    def prepare(self, ablation: Ablation) -> None:
        """Take the directions that every later edit refers to."""
        ...

    def distributions(
        self,
        prompts: TokenRows,
        edits: Sequence[Edit | None],
        read: ReadLogits,
        continuations: TokenRows | None = None,
    ) -> list[list[float]]:
        """What ``read`` makes of the next-token logits of each prompt under each edit: [edit][prompt].

        After the prompt alone, or with ``continuations``, one for each prompt, also after each of its tokens.
        """
        ...

    def generate(
        self, prompts: TokenRows, edits: Sequence[Edit | None], decided: Decided | None = None
    ) -> list[list[list[int]]]:
        """Greedy answers as token ids, without the end token: [edit][prompt][token]."""
        ...

    def apply(self, edit: Edit) -> None:
        """Edit the weights."""
        ...

    def restore(self) -> None:
        """Bring every weight back, bit for bit."""
        ...

    def close(self) -> None:
        """Release the model's memory; the engine is of no use afterwards."""
        ...


def runner_options(job: Job) -> RunnerOptions:
    """What the settings choose of how passes are run."""
    chosen = job.settings.generation
    return RunnerOptions(chosen.max_new_tokens, chosen.batch_size, chosen.cuda_graphs, chosen.prefill_reuse)
