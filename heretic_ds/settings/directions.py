"""The groups ``direction`` and ``ablation`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

from heretic_ds.settings.fields import FINITE, within

METHODS = ("mean_difference", "median_of_means", "som")
"""How directions are found; :mod:`heretic_ds.directions` has a class for each."""
MANY = ("som",)
"""Of those the ones that find several directions a layer."""
MOST_DIRECTIONS = 64


@dataclass
class DirectionSettings:
    """How directions are made from residuals."""

    method: str = within("mean_difference", choices=METHODS)
    """``mean_difference`` (from the baseline prompts' mean residual to the target prompts'), ``median_of_means`` (the
    same between medians of the means of groups, which a few odd prompts cannot move) or ``som`` (``ablation.rank``
    directions a layer: from the baseline mean to each unit of a self-organising map of the target prompts)."""
    groups: int = within(9, ge=3)
    """Groups into which ``median_of_means`` deals the prompts of each kind; no more than there are prompts."""
    orthogonalize: bool = True
    """Keep only the part of each direction that is orthogonal to the baseline mean."""
    winsorize_quantile: float = within(1.0, gt=0, le=1)
    """Clamp each residual's components to this quantile of their absolute values; 1 switches it off."""
    compare: Optional[str] = None
    """Safetensors file with a known ``direction`` [D]: the |cosine| of every block's direction with it is
    reported."""


@dataclass
class ProfileSettings:
    """Ablation weight over the layers for one component. All four numbers, or none."""

    max_weight: Optional[float] = within(None, **FINITE)
    """Weight at ``max_weight_position``."""
    max_weight_position: Optional[float] = within(None, **FINITE)
    """Layer of the largest weight, as a float in layers."""
    min_weight: Optional[float] = within(None, **FINITE)
    """Weight at ``min_weight_distance`` from the position."""
    min_weight_distance: Optional[float] = within(None, **FINITE)
    """Distance in layers beyond which nothing is edited."""


@dataclass
class ProfilesSettings:
    """A fixed edit's profiles, by component."""

    attention: ProfileSettings = field(default_factory=ProfileSettings)
    """Attention output projections, and the linear-attention and convolution projections of hybrids."""
    mlp: ProfileSettings = field(default_factory=ProfileSettings)
    """MLP and expert down projections."""


@dataclass
class AblationSettings:
    """The form of the edits, and a fixed edit for ``task=evaluate|export|chat``."""

    rank: int = within(1, ge=1, le=MOST_DIRECTIONS)
    """Directions that one edit removes together; more than 1 with ``direction.method=som``."""
    row_norm: str = within("full", choices=("none", "pre", "full"))
    """``none``, ``pre`` or ``full``: what happens to the norms of a writer's rows."""
    through_norm: bool = False
    """In families with a norm after the writer, edit along the direction that the norm's gain maps onto the
    stream."""
    direction_index: Optional[float] = within(
        None, ge=0, lt=math.inf, words="at least 0, or null for one direction a layer"
    )
    """One global direction interpolated at this block (a float); null: every layer uses its own."""
    profiles: ProfilesSettings = field(default_factory=ProfilesSettings)
    """Profiles of a fixed edit; null for none."""
