"""What `heretic-ds` and `python -m heretic_ds` start: says the first word before anything slow is imported.

Hydra takes half a second to import, PyTorch and transformers many: nobody should look at an empty screen meanwhile, and
`--help` needs none of them. What else a command is made of is in :mod:`heretic_ds.cli.command`, whose names this
package has too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from heretic_ds import __version__, needs
from heretic_ds.cli.help import answered
from heretic_ds.foreign.streams import keep_standard_streams
from heretic_ds.progress import GREETED

_ABOUT_CONFIGURATION = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; `arguments` are those after the program's name (default: of this process).

    Returns the exit status: 0 done, 2 a mistake in configuration or input, 130 interrupted, 1 anything else.
    """
    keep_standard_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    status = answered(arguments)
    if status is not None:
        return status
    if unfit := needs.unfit_system():
        print(f"heretic-ds: {unfit}", file=sys.stderr)
        return 2
    _greet(arguments)
    from heretic_ds.cli.command import main as run

    return run(arguments)


def _greet(arguments: Sequence[str]) -> None:
    """Name and version at a terminal; in a pipe a run says them once its configuration is known to be right."""
    decides = os.environ.get("RANK", "0") == "0" and not os.environ.get(GREETED)
    if decides and sys.stdout.isatty() and not any(word in _ABOUT_CONFIGURATION for word in arguments):
        print(f"heretic-ds {__version__}", flush=True)
        os.environ[GREETED] = "1"


def __getattr__(name: str) -> Any:
    """What :mod:`heretic_ds.cli.command` has, imported once it is asked for."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("heretic_ds.cli.command"), name)
