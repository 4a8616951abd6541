"""The planner: what each placement would need and take, and which ones ``auto`` chooses. No weights are read.

:func:`facts_of` describes a model and a job, :func:`machine_of` and :func:`machine_here` describe hardware,
:func:`placements_for` lists what there is to choose from, :func:`make_plan` chooses. :class:`KeptBatches` keeps what
runs measure themselves.
"""

from heretic_ds.planner.batches import KeptBatches
from heretic_ds.planner.calibrate import machine_here
from heretic_ds.planner.catalogue import machine_of, placements_for
from heretic_ds.planner.choose import Candidate, Plan, make_plan
from heretic_ds.planner.facts import facts_of, work_of

__all__ = [
    "Candidate",
    "KeptBatches",
    "Plan",
    "facts_of",
    "machine_here",
    "machine_of",
    "make_plan",
    "placements_for",
    "work_of",
]
