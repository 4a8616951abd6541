"""Limits of the system on a process (``ulimit``): what is too little is one line that names the limit, or nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import writing
from heretic_ds.foreign.reading import reading
from heretic_ds.foreign.ulimits import limit_reached
from heretic_ds.settings import Settings
from tests.hostile.harness import Ended, Place, command, copy_of, run_in_copy, settings_for

TRIALS = 4


@pytest.fixture
def here(untouched: Path) -> Place:
    """A folder with a model and prompts."""
    return copy_of(untouched, untouched.with_name("case"), with_run=False)


def under(limit: int, amount: Callable[[], int], place: Place, base: Settings) -> Ended:
    """The command in a copy of this process on which a limit was set."""

    def work() -> int:
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (amount(), hard))
        return command(settings_for(base, {"search.trials": TRIALS, "export.dir": "out"}))

    return run_in_copy(place.root, work)


def held(ended: Ended, flag: str) -> bool:
    """Whether it ended by the limit, which has to be one line that names it; else it has ended well."""
    told = f"{ended.out[-2000:]}\n{ended.err[-6000:]}"
    if ended.status == 0:
        assert ended.err == "", told
        return False
    assert ended.status == 2, told
    [line] = ended.err.splitlines()
    assert line.startswith("heretic-ds: ") and f"(ulimit {flag})" in line and len(line) < 700, told
    return True


def lowest_free() -> int:
    """The descriptor that the next file gets."""
    number = os.dup(0)
    os.close(number)
    return number


@pytest.mark.parametrize("more", [0, 1, 2, 3, 5, 8])
def test_few_open_files(more: int, here: Place, base: Settings) -> None:
    held(under(resource.RLIMIT_NOFILE, lambda: lowest_free() + more, here, base), "-n")
    assert not (here.root / "out").exists() or (here.root / "out" / "model.safetensors").is_file()


def test_some_open_files_are_too_few_and_some_enough(here: Place, base: Settings) -> None:
    """That the numbers above are those at which it matters."""
    assert held(under(resource.RLIMIT_NOFILE, lambda: lowest_free() + 1, here, base), "-n")
    assert not held(under(resource.RLIMIT_NOFILE, lambda: lowest_free() + 60, here, base), "-n")


@pytest.mark.parametrize("kib", [8, 24, 64])
def test_small_files_and_the_rest_later(kib: int, here: Place, base: Settings) -> None:
    """A run that a limit of files' sizes ended goes on without it, to the trials of one that never met it."""
    if held(under(resource.RLIMIT_FSIZE, lambda: kib * 1024, here, base), "-f"):
        assert not (here.root / "out").exists()
    again = under(resource.RLIMIT_FSIZE, lambda: 2**30, here, base)
    assert again.status == 0, again.err
    found = json.loads((here.root / "run" / "results.json").read_text())["trials"]
    assert [trial["index"] for trial in found] == list(range(TRIALS))


@pytest.mark.parametrize("mib", [8, 128])
def test_little_memory(mib: int, here: Place, base: Settings) -> None:
    held(under(resource.RLIMIT_AS, lambda: psutil.Process().memory_info().vms + mib * 2**20, here, base), "-v")


def test_what_means_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    finite = {resource.RLIMIT_NOFILE: 64, resource.RLIMIT_AS: 2**30}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (finite.get(kind, resource.RLIM_INFINITY),) * 2)
    files, memory = "at most 64 files open at once (ulimit -n)", "at most 1048576 KiB of memory"
    for error, said in (
        (OSError(errno.EMFILE, "Too many open files"), files),
        (RuntimeError("Error: Too many open files (os error 24)"), files),
        (MemoryError(), memory),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), memory),
        (ImportError("libx.so: failed to map segment from shared object"), memory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), memory),
        (OSError(errno.EFBIG, "File too large"), None),  # there is no such limit here
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (RuntimeError("broken"), None),
        (KeyError("x"), None),
    ):
        found = limit_reached(error)
        assert (found is None) == (said is None) and (said is None or said in str(found)), error
        wrapped = RuntimeError("something else")
        wrapped.__cause__ = error
        assert limit_reached(wrapped) == found
    for guard in (reading("the/file"), writing(Path("folder"), "run.dir")):
        with pytest.raises(UserError, match=r"ulimit -n.*raise that limit$"), guard:
            raise OSError(errno.EMFILE, "Too many open files")


def test_without_a_limit_an_error_means_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert limit_reached(MemoryError()) is None
