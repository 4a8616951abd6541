"""`python -m tests.slowed WORDS...`: the command, whose stages are silent for some seconds as a larger model's are.

The first time that a stage comes to one of the calls below, it sleeps there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

SECONDS = float(os.environ.get("SLOWED_SECONDS", "3.6"))

_slept: set[str] = set()


def slow(owner: Any, name: str) -> None:
    """Let a function sleep before it works, once in each stage."""
    work: Callable[..., Any] = getattr(owner, name)

    def slowly(*arguments: Any, **options: Any) -> Any:
        from heretic_ds import progress

        stage = progress._boards[-1]._works[0].what if progress._boards else "none"  # type: ignore[attr-defined]
        if stage not in _slept:
            _slept.add(stage)
            time.sleep(SECONDS)
        return work(*arguments, **options)

    setattr(owner, name, slowly)


def main(words: list[str]) -> int:
    """Run the command, whose slow imports are left to where they are."""
    from heretic_ds import cli
    from heretic_ds.cli import command

    dispatch = command._dispatch

    def slowed(settings: Any) -> Any:
        from heretic_ds import job
        from heretic_ds.placements import base
        from heretic_ds.runner.engine import Runner
        from heretic_ds.stages import finish

        for name in ("capture", "generate", "distributions"):
            slow(Runner, name)
        for owner, name in ((job, "open_model"), (base, "load_weights"), (finish, "export_model")):
            slow(owner, name)
        return dispatch(settings)

    command._dispatch = slowed
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
