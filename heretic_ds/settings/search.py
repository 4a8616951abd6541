"""The group ``search`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from heretic_ds.settings.fields import within

AUTO = "auto"
"""Of settings that may be left to the program."""

DIRECT, SCREENED = "direct", "screened"


@dataclass
class SearchSettings:
    """The multi-objective search over edits."""

    strategy: str = within(AUTO, choices=(AUTO, DIRECT, SCREENED))
    """``screened`` (many edits are compared by their KL divergence and the likelihood of what the original answered,
    without generating; those that could be on the front become trials), ``direct`` (every edit that is asked for is
    scored: a trial), or ``auto``: what the run folder began with, in a new one ``screened`` where the first scorer
    counts answers that are to become fewer, else ``direct``."""
    trials: int = within(200, ge=1)
    """Number of trials in the study, those of earlier runs in the same folder included."""
    startup_trials: int = within(60, ge=0)
    """Trials of ``direct`` that are drawn at random before the sampler starts to learn."""
    seed: int = within(0, ge=0)
    """Seed of the sampler."""
    trials_per_pass: str = AUTO
    """Trials asked for, and evaluated in the same forward passes: a whole number, or ``auto``: up to 4, on a CPU one
    for each replica of the model, elsewhere as many as it takes to fill the batches that were measured to be best."""
    candidates: int = within(3, ge=1)
    """Edits that ``screened`` compares for each that it scores."""
    kl_target: float = within(0.01, gt=0, lt=math.inf, words="a number above 0 (nats)")
    """KL divergence (nats) below which the search stops chasing a smaller one."""
