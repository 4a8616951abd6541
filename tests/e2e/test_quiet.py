"""A run that ends well says what it found, and nothing else: no library's warning, on one rank or on several."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT

SMALL = (
    "experiment=demo", "search.trials=3", "search.startup_trials=1", "model.device=cpu", "run.interactive=false",
    *(f"prompts.{kind}.{part}.slice=0:12" for kind in ("target", "baseline") for part in ("train", "eval")),
)  # fmt: skip
FOREIGN = re.compile(
    r"warn|deprecat|traceback|^\[(rank\d+: ?)?\[?[WEI]\d{4}|^\[(WARNING|INFO|ERROR)|^[WEI]\d{4} |gloo|"
    r"\.(py|cpp|cc|h):\d+|WARNING|site-packages",
    re.IGNORECASE | re.MULTILINE,
)
"""What is said in the manner of libraries: of Python, of C++, of loggers."""


def quiet(command: list[str], folder: Path, more: Mapping[str, str]) -> str:
    """What a command said that has to end well, and to say nothing on standard error."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "MPLCONFIGDIR", "MPLBACKEND", "RANK")}
    ended = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    assert not FOREIGN.findall(ended.stdout), ended.stdout
    assert "results are in" in ended.stdout
    return ended.stdout


def test_one_rank(tmp_path: Path) -> None:
    """In a home that does not exist, too: libraries say where else they put their caches."""
    own = {"HOME": str(tmp_path / "nowhere"), "XDG_CACHE_HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere"}
    quiet([sys.executable, "-m", "heretic_ds", *SMALL], tmp_path, own)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "placed",
    [
        ("capture=zero3", "evaluate=tensor_parallel"),
        pytest.param(("capture=fsdp", "evaluate=fsdp"), marks=pytest.mark.thorough),
        pytest.param(("capture=pipeline", "evaluate=pipeline"), marks=pytest.mark.thorough),
        pytest.param(("capture=replicated", "evaluate=replicated"), marks=pytest.mark.thorough),
    ],
    ids=lambda placed: placed[1],
)
def test_two_ranks(placed: tuple[str, ...], tmp_path: Path) -> None:
    quiet([str(ROOT / "launch" / "run.sh"), "-n", "2", *SMALL, *placed], tmp_path, {"DS_ACCELERATOR": "cpu"})
