"""What a command needs of the system and of what is installed; what is missing is one sentence.

Nothing slow is imported here: it is asked before anything else is done.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from heretic_ds.errors import UserError

DEEPSPEED = "deepspeed>=0.19.8,<0.20"
"""What pip is told to install, as ``pyproject.toml`` has it."""
_DEEPSPEED = "deepspeed"


def unfit_system() -> str | None:
    """Why this cannot run here; None where it can."""
    if sys.platform != "win32":
        return None
    return (
        "heretic-ds runs on Linux and macOS, and this is Windows; install and run it in the Windows Subsystem for "
        "Linux (wsl --install)"
    )


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """While open, nobody imports DeepSpeed who has not yet.

    transformers asks accelerate, where that is installed, whether a model that is saved is one of DeepSpeed's, and that
    takes the import of all of it.
    """
    if _DEEPSPEED in sys.modules:
        yield
        return
    modules = cast("dict[str, Any]", sys.modules)
    modules[_DEEPSPEED] = None  # Python's own sign for what cannot be imported
    try:
        yield
    finally:
        del modules[_DEEPSPEED]


def check_deepspeed(what: str) -> None:
    """Raise UserError where DeepSpeed, which ``what`` is done by, is not installed. Does not import it."""
    if importlib.util.find_spec(_DEEPSPEED) is None:
        raise UserError(f'{what} needs DeepSpeed, which is not installed here: pip install "{DEEPSPEED}"')


def check_bitsandbytes(what: str) -> None:
    """Raise UserError where bitsandbytes, or accelerate, by which transformers loads it, is not installed. Imports
    neither."""
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f'{what} needs {package}, which is not installed here: pip install "heretic-ds[bnb]"')
