"""What a method of finding directions is given, and what it gives.

Shapes: L blocks, D width, R directions a layer. Residuals have L+1 entries, see :mod:`heretic_ds.ablation.directions`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from heretic_ds.prompts import TokenRows
from heretic_ds.world import World

_ROUNDING = 1e-6
"""Of a mean residual's norm, what batches of other sizes make of it in float32, and some more."""


class Captures(Protocol):
    """What a method asks of an engine over the original model; all ranks ask together."""

    def capture(self, prompts: TokenRows, winsorize_quantile: float = 1.0) -> Tensor:
        """Mean residuals [L+1, D], float64, at the last position of each prompt, on every rank."""
        ...

    def residuals(
        self, prompts: TokenRows, take: Callable[[Sequence[int], Tensor], None], winsorize_quantile: float = 1.0
    ) -> None:
        """Hand the residuals [L+1, B, D], float32 on the host, of the prompts at B places to ``take``, on rank 0, as
        they come.

        One pass; every prompt comes once, in any order. Hosts hold what is under way, a few hundred MB, and whatever
        ``take`` keeps.
        """
        ...


@dataclass(frozen=True)
class Request:
    """What directions are to be made of, and how."""

    target: TokenRows
    baseline: TokenRows
    entries: int
    """L+1."""
    width: int
    """D."""
    orthogonalize: bool = True
    """Keep only what is orthogonal to the baseline prompts' centre."""
    winsorize_quantile: float = 1.0
    rank: int = 1
    """R."""
    groups: int = 9
    """Of :class:`heretic_ds.directions.MedianOfMeans`."""
    folder: Path | None = None
    """Where rank 0 may put residuals for the while; None: where the system has temporary files."""

    @property
    def tells_apart(self) -> bool:
        """Whether the two kinds are not the same prompts: between those, rounding alone makes a direction."""
        return sorted(map(tuple, self.target)) != sorted(map(tuple, self.baseline))


@dataclass(frozen=True)
class Found:
    """Directions, and the centres that they lie between."""

    directions_LRD: Tensor
    """Orthonormal directions [L+1, R, D], float64, on the CPU; zero where the two kinds of prompts agree."""
    target_LD: Tensor
    """Centres of the target prompts' residuals: means, or what a method has in their place."""
    baseline_LD: Tensor
    """Of the baseline prompts'."""

    @property
    def is_finite(self) -> bool:
        """Whether residuals were numbers."""
        return all(bool(each.isfinite().all()) for each in (self.directions_LRD, self.target_LD, self.baseline_LD))

    @property
    def is_any(self) -> bool:
        """Whether the two kinds of prompts differ at some block by more than rounding, which depends on batches."""
        apart_L = (self.target_LD - self.baseline_LD)[1:].norm(dim=1)
        clear_L = apart_L > _ROUNDING * self.baseline_LD[1:].norm(dim=1)
        return bool((self.directions_LRD[1:].any(dim=(1, 2)) & clear_L).any())


class Method(ABC):
    """One way to find directions."""

    name: ClassVar[str]
    """What ``direction.method`` calls it."""
    many: ClassVar[bool] = False
    """Whether it finds several directions a layer."""

    @abstractmethod
    def find(self, engine: Captures, request: Request, world: World) -> Found:
        """The directions, alike on all ranks, which call it together. Whether there are any, and in numbers, is
        for :class:`Found` to tell."""
