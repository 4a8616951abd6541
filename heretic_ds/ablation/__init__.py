"""Directions, profiles and edits: pure tensor mathematics without files, ranks or configuration."""

from heretic_ds.ablation.directions import (
    Ablation,
    ResidualMeans,
    aligned,
    behaviour_directions,
    block_direction,
    orthonormal,
    through_norm,
    winsorize,
)
from heretic_ds.ablation.edit import (
    ROW_NORMS,
    Edit,
    OutputOperator,
    Reduce,
    edit_weight,
    edit_weight_,
    exact_factors,
    output_operator,
    reciprocal,
    row_norms,
    row_overlaps,
    row_scales,
)
from heretic_ds.ablation.low_rank import LowRank, low_rank_edit
from heretic_ds.ablation.profile import COMPONENTS, Profile
