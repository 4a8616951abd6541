"""Limits that somebody has set on this process (``ulimit``), named where an error means that one is reached.

Libraries wrap what the system said in errors of their own, or in texts; so an error is asked together with those that
it came from.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class _Limit:
    """One of the limits, and by what it is known that it is reached."""

    kind: str
    """Its name in :mod:`resource`, which not every system has."""
    flag: str
    """Of ``ulimit``."""
    unit: int
    """Of what ``ulimit`` takes, in those of the system."""
    codes: tuple[int, ...]
    """Of the system's errors."""
    texts: tuple[str, ...]
    """Parts of what libraries say, beside the system's own words for the codes."""
    meaning: str
    """With the number in it, in what ``ulimit`` takes."""


_LIMITS = (  # that of memory before that of threads, which need memory to start
    _Limit("RLIMIT_NOFILE", "-n", 1, (errno.EMFILE,), (), "may have at most {} files open at once"),
    _Limit("RLIMIT_FSIZE", "-f", 1024, (errno.EFBIG,), (), "may write files of at most {} KiB"),
    _Limit(
        "RLIMIT_AS", "-v", 1024, (errno.ENOMEM,),
        ("can't allocate memory", "not enough memory", "failed to map segment", "can't start new thread",
         "bad_alloc"),
        "may take at most {} KiB of memory's addresses",
    ),
    _Limit(
        "RLIMIT_NPROC", "-u", 1, (errno.EAGAIN,), ("can't start new thread",), "may have at most {} threads"
    ),
)  # fmt: skip
_CHAIN = 20
"""Errors that are looked at, of those that came from each other."""


def limit_reached(error: BaseException) -> str | None:
    """What limit on this process an error means, and what to do about it, as a sentence; None where it means none.

    A limit counts where one is set: without it the same error means that the machine itself has no more.
    """
    try:
        import resource
    except ImportError:
        return None
    for cause in _causes(error):
        for limit in _LIMITS:
            allowed, _ = resource.getrlimit(getattr(resource, limit.kind))
            if allowed != resource.RLIM_INFINITY and _means(cause, limit):
                named = limit.meaning.format(allowed // limit.unit)
                return f"this process {named} (ulimit {limit.flag}), which is too little; raise that limit"
    return None


def _means(error: BaseException, limit: _Limit) -> bool:
    if isinstance(error, OSError) and error.errno in limit.codes:
        return True
    if isinstance(error, MemoryError):
        return limit.kind == "RLIMIT_AS"
    if not isinstance(error, RuntimeError | OSError | ImportError | ValueError) and "Error" not in type(error).__name__:
        return False
    told = str(error)
    return any(text in told for text in (*map(os.strerror, limit.codes), *limit.texts))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    current: BaseException | None = error
    for _ in range(_CHAIN):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__
