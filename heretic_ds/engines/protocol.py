"""What every placement offers, whatever lies behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from heretic_ds.ablation import Edit, block_direction, through_norm
from heretic_ds.loading import LoadedModel

TokenRows = Sequence[Sequence[int]]
"""Prompts as token ids, one row each, unpadded, ending where the answer starts."""

Decided = Callable[[Sequence[Sequence[int]]], Sequence[bool]]
"""For each of several answers, given by their first tokens: whether its scores can no longer change."""


@dataclass(frozen=True)
class Ablation:
    """What all edits of a run share: the directions and the form of the edit."""

    directions_LD: Tensor
    """Unit directions [L+1, D], float64."""
    row_norm: str
    """One of :data:`heretic_ds.ablation.ROW_NORMS`."""
    through_norm: bool
    """Edit along the direction that a norm after the writer maps onto the stream's."""

    def writer_direction(self, block: int, gain_D: Tensor | None, direction_index: float | None) -> Tensor:
        """Unit direction [D] along which a writer of ``block`` is edited; ``gain_D`` is that of a norm after it."""
        direction_D = block_direction(self.directions_LD, block, direction_index)
        return (
            through_norm(direction_D, gain_D.to(direction_D) if gain_D is not None else None)
            if self.through_norm
            else direction_D
        )


class Engine(Protocol):
    """One model on its devices.

    ``kl`` and ``generate`` take up to ``max_edits_per_pass`` edits and leave the weights as they found them, as far as
    a caller can tell; ``apply`` edits the weights themselves until ``restore``. An edit of None stands for the weights
    as they are.
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

    def reference(self, prompts: TokenRows) -> Any:
        """First-token distributions of the model as it stands, to be passed to :meth:`kl`."""
        ...

    def kl(self, prompts: TokenRows, reference: Any, edits: Sequence[Edit | None]) -> list[float]:
        """For each edit the mean over prompts of KL(reference || edited) of the first answer token, in nats."""
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
