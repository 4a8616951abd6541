"""Whether two ways to the same logits differ by more than rounding."""

from __future__ import annotations

from torch import Tensor

_TOLERANCE, _TIMES_ROUNDING = 1e-4, 4.0
"""How far logits may be off, as a part of their spread: at least, and in multiples of rounding."""


def distance(found_BV: Tensor, expected_BV: Tensor) -> float:
    """How far logits are off, as a part of their spread."""
    expected_BV = expected_BV.double()
    spread = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm()
    return ((found_BV.double() - expected_BV).norm() / spread).item()


def is_rounding(error: float, rounding: float) -> bool:
    """Whether a distance is explained by another one, between logits that differ in rounding alone."""
    return error <= max(_TOLERANCE, _TIMES_ROUNDING * rounding)
