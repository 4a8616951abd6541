"""What libraries say of files and of themselves, which is nothing that the user of a command can mend."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_LOGGERS: dict[str, str | None] = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
    "lm_eval": "LMEVAL_LOG_LEVEL",
    "matplotlib": None,
    "bitsandbytes": None,
}
"""Names of libraries' loggers, each with the variable by which a user asks for what they say, where there is one."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While open, libraries' warnings are not shown, unless the user asks for them (``-W``, ``PYTHONWARNINGS``, or the
    libraries' own variables). What matters of them this program says itself."""
    with ExitStack() as stack:
        if not sys.warnoptions:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        for name, variable in _LOGGERS.items():
            if variable is None or variable not in os.environ:
                logger = logging.getLogger(name)
                stack.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.ERROR)
        yield
