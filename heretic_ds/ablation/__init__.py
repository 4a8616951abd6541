"""Directions, profiles and edits: pure tensor mathematics without files, ranks or configuration."""

from heretic_ds.ablation.directions import (
    Ablation,
    ResidualMeans,
    behaviour_directions,
    block_direction,
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
    output_operator,
    rank_one,
    row_norms,
    row_overlaps,
)
from heretic_ds.ablation.low_rank import LowRank, low_rank_edit
from heretic_ds.ablation.profile import COMPONENTS, Profile
