"""The stages of a run, in the order in which :mod:`heretic_ds.pipeline` tells them."""

from heretic_ds.stages.finish import (
    export_edited,
    finish,
    objective_of,
    report_front,
    select_and_verify,
    verify,
)
from heretic_ds.stages.fixed import named_edit, score_fixed_edit, verify_named
from heretic_ds.stages.measure import (
    capture_directions,
    find_response_prefix,
    fixed_directions,
    measure_original,
)
from heretic_ds.stages.opening import Run, already_finished, opened, refuse_used_export_folder
from heretic_ds.stages.search import search_edits
from heretic_ds.stages.talk import menu, talk, wants_menu

__all__ = [
    "Run",
    "already_finished",
    "capture_directions",
    "export_edited",
    "find_response_prefix",
    "finish",
    "fixed_directions",
    "measure_original",
    "menu",
    "named_edit",
    "objective_of",
    "opened",
    "refuse_used_export_folder",
    "report_front",
    "score_fixed_edit",
    "search_edits",
    "select_and_verify",
    "talk",
    "verify",
    "verify_named",
    "wants_menu",
]
