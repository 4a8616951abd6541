"""What a process does because a launcher started it as one rank of many: it speaks only where it should, it leaves
word of how it ended, and it never outlives the launcher.

Nothing here imports torch: the guard stands before the slow imports begin.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

FOLDER = "HERETIC_DS_RANKS"
"""Environment variable: where ranks under `heretic_ds.launching` leave word; absent under a bare launcher."""

_DEEPSPEED = "deepspeed.launcher.launch"
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 2.0
_SECONDS_TO_DIE = 10.0
_SECONDS_FOR_RANK_0 = 5.0

_entered = False


def run(command: Callable[[], int]) -> int:
    """Run a command as this process's part of the job, and return its exit status.

    Without a launcher (no RANK in the environment) it is just called.
    """
    enter()
    status = command()
    if status == 0:
        leave_word("", status)
    return status


def enter() -> None:
    """Make this process a rank: to be called before anything is printed or torch is imported."""
    global _entered
    if "RANK" not in os.environ:
        return
    _entered = True
    die_with_parent()
    threading.Thread(target=_watch, args=(_ancestors(),), name="rank guard", daemon=True).start()
    file = _words_file()
    if file is not None:
        _write(file, {"pid": os.getpid()})
    if os.environ["RANK"] != "0":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C means
        _redirect(file.with_suffix(".log") if file else Path(os.devnull), also_errors=file is not None)


def leave_word(text: str, status: int, shared: bool = True) -> bool:
    """Leave word of how this rank ends; True where somebody else will show it to the user.

    ``text`` is what the user has to see; ``shared`` says that rank 0 mostly comes to the same. The first word counts:
    later ones are consequences.
    """
    above_0, file = os.environ.get("RANK", "0") != "0", _words_file()
    if not _entered:
        return shared and above_0
    if file is not None:
        if not file.is_file() or "status" not in json.loads(file.read_text(encoding="utf-8")):
            _write(file, {"pid": os.getpid(), "status": status, "text": text, "time": time.time()})
        return True
    if above_0 and shared:
        # Where rank 0 says the same, the launcher ends this rank meanwhile. What this rank alone found, it says.
        time.sleep(_SECONDS_FOR_RANK_0)
    return False


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, also while it hangs in a library (Linux only)."""
    if sys.platform == "linux":
        _libc_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if sys.platform == "linux":
    _libc_prctl = ctypes.CDLL(None, use_errno=True).prctl


def _ancestors() -> list[psutil.Process]:
    """Whose end is this rank's end: the parent, and above DeepSpeed's own per-node launcher who started that.

    A SIGTERM to `deepspeed` ends its outer process only: its per-node process is orphaned and goes on with the ranks.
    Under other launchers the grandparent may be a shell, which ends when somebody logs out.
    """
    parent = psutil.Process().parent()
    if parent is None or parent.pid == 1:
        return []
    try:
        above = parent.parent() if _DEEPSPEED in parent.cmdline() else None
    except psutil.Error:  # gone already, or not ours to look at
        above = None
    return [parent] if above is None or above.pid == 1 else [parent, above]


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that ended and was not yet waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _watch(ancestors: list[psutil.Process]) -> None:
    while all(map(is_alive, ancestors)):
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_DIE)
    os.kill(os.getpid(), signal.SIGKILL)


def _redirect(file: Path, also_errors: bool) -> None:
    """Send this process's output, that of libraries included, to a file."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    os.dup2(handle, 1)
    if also_errors:
        sys.stderr.flush()
        os.dup2(handle, 2)
    os.close(handle)


def _words_file() -> Path | None:
    """Where this rank leaves word, beside its log; None under a bare launcher."""
    folder = os.environ.get(FOLDER)
    return Path(folder) / f"rank-{os.environ['RANK']}.json" if folder and _entered else None


def _write(file: Path, words: dict[str, object]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(words), encoding="utf-8")
    part.replace(file)
