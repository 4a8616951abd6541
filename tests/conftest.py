"""What all tests share: one thread, the CPU, no network, no writing into anyone's caches, and ways to run the command.

The environment is set here, at import, because torch and the Hugging Face libraries read it at theirs.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

_caches = tempfile.mkdtemp(prefix="heretic_ds_tests_")
atexit.register(shutil.rmtree, _caches, ignore_errors=True)

os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=os.path.join(_caches, "huggingface"),
    MPLCONFIGDIR=os.path.join(_caches, "matplotlib"),
    MPLBACKEND="Agg",
    XDG_CACHE_HOME=os.path.join(_caches, "cache"),
    COLUMNS="160",
)
for _variable in ("HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(_variable, None)

ON_CUDA = os.environ.get("HERETIC_DS_TEST_CUDA") == "1"  # as `make test-cuda` sets it
if not ON_CUDA:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what tests expect is what CPUs compute

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts jobs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start has to heed Ctrl-C

from heretic_ds.settings import Settings  # noqa: E402

RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]
ComposeSettings = Callable[..., Settings]


def pytest_configure() -> None:
    """Tests that were asked for on a GPU do not pass by being skipped."""
    if not ON_CUDA:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.exit("make test-cuda needs a CUDA device, and this machine has none that PyTorch can use", 2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that start vLLM stay in one worker of pytest-xdist, with those that start ranks."""
    for item in items if config.pluginmanager.hasplugin("xdist") else []:
        if "vllm_python" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_collection_finish() -> None:
    """Engines collect garbage when they close, which takes ten times as long where modules are looked through too."""
    gc.collect()
    gc.freeze()


def benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/``, which finds those beside it as it does when it is run."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(autouse=True)
def messages_are_heard() -> None:
    """Messages of the package reach ``caplog``, whatever a command that an earlier test ran in this process has left:
    while it runs they go to its console alone, and libraries set loggers up."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "heretic_ds":
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def compose_settings() -> ComposeSettings:
    """`compose_settings("search.trials=5", model="folder")`: settings as the command line would make them."""
    from heretic_ds.cli import compose

    def of_overrides(*overrides: str, model: str | os.PathLike[str] = "model") -> Settings:
        return compose([str(model), *overrides])

    return of_overrides


@pytest.fixture
def evaluated(compose_settings: ComposeSettings, tmp_path: Path) -> Callable[..., Any]:
    """`evaluated("generation.cuda_graphs=false")`: the engine that a run over a tiny model evaluates with."""
    from heretic_ds.job import Job
    from heretic_ds.placements import build_engine
    from heretic_ds.world import World
    from tests import families

    families.save("llama", tmp_path)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    sources = [
        f"prompts.{kind}.{part}.source={tmp_path}/prompts.txt"
        for kind in ("target", "baseline")
        for part in ("train", "eval")
    ]

    def build(*overrides: str) -> Any:
        return build_engine(Job.check(compose_settings(*sources, *overrides, model=tmp_path), World.join()), "evaluate")

    return build


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of an environment with vLLM: `HERETIC_VLLM_PYTHON`, or what `make vllm-env` has made."""
    python = os.environ.get("HERETIC_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("vLLM has no environment: run `make vllm-env`, or set HERETIC_VLLM_PYTHON to a Python that has it")
    return python


@pytest.fixture
def run_command(tmp_path: Path) -> RunCommand:
    """`run_command("model", "search.trials=5")`: the command in a process of its own, in an empty folder."""

    def run(
        *arguments: str | os.PathLike[str], cwd: Path | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-m", "heretic_ds", *map(str, arguments)],
            cwd=cwd or tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
