"""Programs that others wrote, such as chat templates, run in a child process that cannot take more than its share.

A deadline within this process would not do: one operation (``9 ** 9 ** 9``, a text times a billion) takes its time and
memory inside the interpreter, where neither a thread nor a signal ends it. A child is ended by the kernel, or, where
that knows no limits for a process (macOS), by its parent, which looks at it.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import psutil

T = TypeVar("T")

SECONDS, MEMORY = 10, 2**30
"""Of processor time, and bytes beside those that this process has: what a child is given."""
_ANSWER = 2**28
"""Most bytes that a child may answer with."""
_KERNEL_LIMITS = hasattr(psutil.Process, "rlimit")
_LOOK_SECONDS = 0.05


class TooMuch(RuntimeError):
    """Foreign code took more time, memory or room than it was given, or broke down; the text says which."""


def in_child(work: Callable[[], T], seconds: int | None = None) -> T:
    """What ``work`` returns, which has to be plain data, from a copy of this process.

    The copy gets so many seconds of processor time (default: SECONDS) and three times as many by the clock; nothing
    that it changes is seen here. Raises TooMuch, or the error of ``work``, as far as it can be carried over: as its own
    kind where that is one of Python's, else as a ValueError with its text.
    """
    seconds = seconds or SECONDS
    read_end, write_end = os.pipe()
    with _quiet_fork():
        child = os.fork()
    if child == 0:
        _work(work, write_end, seconds)
    os.close(write_end)
    try:
        answer = _received(read_end, 3 * seconds, (lambda: None) if _KERNEL_LIMITS else _watch(child, seconds))
    finally:
        os.close(read_end)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has answered, or never will
        _, status = os.waitpid(child, 0)
    if answer is None:
        raise TooMuch(f"it did not end within {3 * seconds} s")
    if len(answer) > _ANSWER:
        raise TooMuch(f"it makes more than {_ANSWER >> 20} MiB of text")
    if not answer:
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        raise TooMuch(_too_long(seconds) if ended == signal.SIGXCPU else "it broke the process it ran in")
    done, result = pickle.loads(answer)  # of our own making
    if done:
        return result
    raise result


def _work(work: Callable[[], T], write_end: int, seconds: int) -> None:
    """The child's whole life. It leaves without a word to anything of its parent's: no buffers, no exit handlers."""
    try:
        try:
            _limit_this_process(seconds)
            answer = pickle.dumps((True, work()))
        except MemoryError:
            answer = pickle.dumps((False, TooMuch(_too_large())))
        except Exception as error:
            answer = pickle.dumps((False, _portable(error)))
        with open(write_end, "wb") as out:
            out.write(answer)
    finally:
        os._exit(0)


def _limit_this_process(seconds: int) -> None:
    faulthandler.disable()  # where the process breaks, its parent says so
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _KERNEL_LIMITS:
        _limit(psutil.Process(), seconds)


def _limit(process: psutil.Process, seconds: int) -> None:
    """Have the kernel hold a process to its share, and leave no core file where that ends it."""
    process.rlimit(psutil.RLIMIT_CORE, (0, 0))
    process.rlimit(psutil.RLIMIT_CPU, (seconds, seconds + 1))
    _, hard = process.rlimit(psutil.RLIMIT_AS)
    limit = process.memory_info().vms + MEMORY
    process.rlimit(psutil.RLIMIT_AS, (limit if hard == psutil.RLIM_INFINITY else min(limit, hard), hard))


def _watch(child: int, seconds: int) -> Callable[[], None]:
    """A look at a child, which raises TooMuch once that has taken more than its share."""
    process, most = psutil.Process(child), psutil.Process().memory_info().rss + MEMORY

    def look() -> None:
        with suppress(psutil.Error):  # it has ended
            if process.memory_info().rss > most:
                raise TooMuch(_too_large())
            times = process.cpu_times()
            if times.user + times.system > seconds:
                raise TooMuch(_too_long(seconds))

    return look


def _too_large() -> str:
    return f"it takes more than {MEMORY >> 20} MiB of memory"


def _too_long(seconds: int) -> str:
    return f"it took more than {seconds} s"


def _portable(error: Exception) -> Exception:
    text = " ".join(str(error).split()) or type(error).__name__
    own = type(error).__module__ == "builtins" and not isinstance(error, OSError | UnicodeError)
    return type(error)(text) if own else ValueError(text)


def _received(read_end: int, seconds: float, look: Callable[[], None]) -> bytes | None:
    """All that the child writes until it ends, with a look at it now and then; None where the time is over before."""
    deadline, parts, size = time.monotonic() + seconds, [], 0
    while size <= _ANSWER:
        if not select.select([read_end], [], [], _LOOK_SECONDS)[0]:
            if time.monotonic() > deadline:
                return None
            look()
            continue
        part = os.read(read_end, 2**20)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)


@contextmanager
def _quiet_fork() -> Iterator[None]:
    """Nothing is said of the copy: Python warns of threads that it lacks, and the tokenizers' library of its own, and
    neither is used there."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = before or "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if before is None:
            os.environ.pop(name, None)
