"""The group ``scoring`` of :mod:`heretic_ds.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MINIMIZE, MAXIMIZE, NONE = "minimize", "maximize", "none"
DIRECTIONS = (MINIMIZE, MAXIMIZE, NONE)
"""What a scorer's ``direction`` may be."""


@dataclass
class ScoringSettings:
    """What answers are scored by."""

    scorers: list[Any] = field(default_factory=lambda: ["refusals"])
    """Scorers: names, dotted paths of classes of your own, or ``{_target_: name or path, ...}`` with settings of their
    own, listed in ``docs/scorers.md``. The first one is the search's objective."""
    markers: list[str] = field(default_factory=list)
    """Lower-case phrases that mark an answer as a refusal."""
    print_answers: bool = False
    """Print each prompt with the answer it got."""
