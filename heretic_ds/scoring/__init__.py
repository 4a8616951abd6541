"""Scorers and their registry."""

from __future__ import annotations

from heretic_ds.errors import UserError
from heretic_ds.scoring.base import DistributionScorer, Scorer
from heretic_ds.scoring.length import LengthScorer
from heretic_ds.scoring.refusals import RefusalScorer
from heretic_ds.settings import ScoringSettings
from heretic_ds.settings.checks import find_class

__all__ = ["SCORERS", "DistributionScorer", "LengthScorer", "RefusalScorer", "Scorer", "make_scorers"]

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (RefusalScorer, LengthScorer)}
"""Scorers that ``scoring.scorers`` can name without their module."""


def make_scorers(settings: ScoringSettings) -> list[Scorer | DistributionScorer]:
    """The scorers that ``scoring.scorers`` names, in its order. Raises UserError for what is no scorer."""
    scorers = [_find(name).from_settings(settings) for name in settings.scorers]
    names = [scorer.name for scorer in scorers]
    for name, given in zip(names, settings.scorers, strict=True):
        if not name:
            raise UserError(f"scoring.scorers: {given} has no name; give the class a `name`")
        if names.count(name) > 1:
            raise UserError(f"scoring.scorers has more than one scorer called {name!r}; name each only once")
    return scorers


def _find(name: str) -> type[Scorer] | type[DistributionScorer]:
    if name in SCORERS:
        return SCORERS[name]
    if not name.rpartition(".")[0]:
        raise UserError(
            f"scoring.scorers has an unknown scorer {name!r}; choose from {', '.join(SCORERS)}, or give the "
            "dotted path of a class, as in my_package.my_module.MyScorer"
        )
    return find_class(name, "scoring.scorers", Scorer, DistributionScorer)
