"""Find and remove a behaviour's direction from a language model's weights, at any size.

As a library, on a model that is in memory already::

    import heretic_ds as hd

    directions = hd.capture(model, tokenizer, target, baseline)
    with hd.ablated(model, directions.edit()):
        model.generate(...)

What it offers is in :mod:`heretic_ds.library`, and imported when it is first used: torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heretic_ds.ablation import Profile
    from heretic_ds.library.models import Chat, Directions, ModelEdit, Scores, ablated, apply, capture, load, score
    from heretic_ds.library.runs import FinishedRun, load_run

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Directions",
    "FinishedRun",
    "ModelEdit",
    "Profile",
    "Scores",
    "ablated",
    "apply",
    "capture",
    "load",
    "load_run",
    "score",
]

_HOMES = {"Profile": "ablation", "FinishedRun": "library.runs", "load_run": "library.runs"}
"""Modules of names that are not in ``library.models``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'library.models')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
