"""Standard streams that take nothing or are not there end no run; and a rank that waits in vain says so in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heretic_ds import cli
from tests.conftest import ROOT


def help_of(folder: Path, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    """The quickest that the command says, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "heretic_ds", "--help"],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False, **streams,
    )  # fmt: skip


def full() -> Any:
    """A file on a disk that is full, as Linux has one."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    return open("/dev/full", "wb")


def broken() -> Any:
    """A pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "wb")


@pytest.mark.parametrize("make", [full, broken])
def test_output_that_nobody_takes(make: Callable[[], Any], tmp_path: Path) -> None:
    with make() as out:
        ended = help_of(tmp_path, stdout=out, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_errors_that_nobody_takes_keep_their_status(tmp_path: Path) -> None:
    with broken() as err:
        ended = subprocess.run(
            [sys.executable, "-m", "heretic_ds", "no", "model"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=err, timeout=60, check=False,
        )  # fmt: skip
    assert ended.returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """The files that are opened next are not taken for them."""
    program = (
        "import os, sys; from heretic_ds.foreign.streams import keep_standard_streams; keep_standard_streams(); "
        "file = open('made', 'w'); print('out'); print('err', file=sys.stderr); sys.stdin.read(); sys.stdin.isatty(); "
        "file.write(str(file.fileno() > 2)); file.close()"
    )
    command = f'exec {sys.executable} -c "{program}" {closed}'
    ended = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ended.returncode == 0
    assert (tmp_path / "made").read_text() == "True"


def test_a_rank_that_waited_in_vain_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete")
    assert cli.report(error) == 1
    assert "RuntimeError" in capsys.readouterr().err  # without ranks it is something else
    monkeypatch.setenv("RANK", "0")
    assert cli.report(error) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("heretic-ds: rank 0 waited for another rank for as long as it may")
