"""Scorers and their registry."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from heretic_ds.errors import UserError
from heretic_ds.scoring.base import Scorer
from heretic_ds.scoring.length import LengthScorer
from heretic_ds.scoring.refusals import RefusalScorer
from heretic_ds.settings import ScoringSettings

__all__ = ["SCORERS", "LengthScorer", "RefusalScorer", "Scorer", "make_scorers"]

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (RefusalScorer, LengthScorer)}
"""Scorers that ``scoring.scorers`` can name without their module."""


def make_scorers(settings: ScoringSettings) -> list[Scorer]:
    """The scorers that ``scoring.scorers`` names, in its order. Raises UserError for what is no scorer."""
    scorers = [_find(name).from_settings(settings) for name in settings.scorers]
    names = [scorer.name for scorer in scorers]
    for name, given in zip(names, settings.scorers, strict=True):
        if not name:
            raise UserError(f"scoring.scorers: {given} has no name; give the class a `name`")
        if names.count(name) > 1:
            raise UserError(f"scoring.scorers has more than one scorer called {name!r}; name each only once")
    return scorers


def _find(name: str) -> type[Scorer]:
    if name in SCORERS:
        return SCORERS[name]
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise UserError(
            f"scoring.scorers has an unknown scorer {name!r}; choose from {', '.join(SCORERS)}, or give the "
            "dotted path of a class, as in my_package.my_module.MyScorer"
        )
    if os.getcwd() not in sys.path:  # a module in the working folder is found however the command was started
        sys.path.append(os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"scoring.scorers: {name} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Scorer)):
        raise UserError(f"scoring.scorers: {name} is not a class derived from heretic_ds.scoring.Scorer")
    return found
