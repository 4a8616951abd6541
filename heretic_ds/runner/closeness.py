"""Whether two ways to the same logits differ by more than rounding."""

from __future__ import annotations

from torch import Tensor

_TOLERANCE, _TIMES_ROUNDING, _MOST = 1e-4, 4.0, 0.1
"""How far logits may be off, as a part of their spread: at least, in multiples of rounding, and at most. Logits that
depend on what else is in the batch are no measure of rounding."""


def distance(found_BV: Tensor, expected_BV: Tensor) -> float:
    """How far logits are off, as a part of their spread."""
    expected_BV = expected_BV.double()
    spread = (expected_BV - expected_BV.mean(-1, keepdim=True)).norm()
    return ((found_BV.double() - expected_BV).norm() / spread).item()


def is_rounding(error: float, rounding: float) -> bool:
    """Whether a distance is explained by another one, between logits that differ in rounding alone."""
    return error <= min(max(_TOLERANCE, _TIMES_ROUNDING * rounding), _MOST)
