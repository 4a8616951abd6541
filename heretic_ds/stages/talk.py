"""What happens at a terminal: the menu after a search, and the chat."""

from __future__ import annotations

import sys

from heretic_ds.settings import Settings


def wants_menu(settings: Settings) -> bool:
    """Whether the run ends with a menu: as ``run.interactive`` says, else where there is somebody to ask."""
    if settings.run.interactive is not None:
        return settings.run.interactive
    return sys.stdin.isatty() and sys.stdout.isatty()
