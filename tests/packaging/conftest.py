"""The wheel, built once for all tests of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

PARTS_OF_THE_BUILD = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "conf",
    "heretic_ds",
    "hydra_plugins",
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_elsewhere(
    *command: str | os.PathLike[str], cwd: Path, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command that has to succeed, without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    ended = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended


@pytest.fixture(scope="session")
def run() -> Run:
    return run_elsewhere


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources that has someone's personal defaults in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in PARTS_OF_THE_BUILD:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    (folder / "conf" / "local").mkdir(exist_ok=True)
    (folder / "conf" / "local" / "default.yaml").write_text("# @package _global_\nsearch:\n  trials: 99\n")
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    pip_wheel = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    run_elsewhere(sys.executable, *pip_wheel, target, source, cwd=source)
    [built] = target.glob("heretic_ds-*.whl")
    return built
