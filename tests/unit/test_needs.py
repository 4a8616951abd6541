"""Where this runs and what it says where it does not: systems, and environments without DeepSpeed."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from heretic_ds import cli, needs
from heretic_ds.checkpoint.open import ModelChoice, load_weights, open_model
from heretic_ds.errors import UserError
from heretic_ds.export.checkpoint import export_model
from heretic_ds.launching.__main__ import main as launch
from heretic_ds.launching.plan import Launch, make_plan
from tests import families
from tests.conftest import ROOT
from tests.unit.test_layers import files

OF_SOME_SYSTEMS = ("curses", "fcntl", "grp", "msvcrt", "pty", "pwd", "readline", "resource", "termios", "tty", "winreg")
"""Modules that Python has on some systems only."""
DEEPSPEED = r'needs DeepSpeed, which is not installed here: pip install "deepspeed>=0\.19\.8,<0\.20"$'

APART = ("heretic_ds.placements.kernel_inject.policies", "heretic_ds.placements.vllm.inside")
"""Modules for machines and environments of their own."""
AS_ON_A_MAC = f"""
import builtins, importlib, pkgutil, sys
import psutil
del psutil.Process.rlimit
sys.modules["deepspeed"] = None
imported = builtins.__import__

def limited(name, globals=None, *rest, **more):
    ours = (globals or {{}}).get("__name__", "").startswith(("heretic_ds", "hydra_plugins"))
    if ours and name.partition(".")[0] in {OF_SOME_SYSTEMS}:
        raise ImportError(name)
    return imported(name, globals, *rest, **more)

builtins.__import__ = limited
import heretic_ds
for module in pkgutil.walk_packages(heretic_ds.__path__, "heretic_ds."):
    if not module.name.endswith(".__main__") and not module.name.startswith({APART}):
        importlib.import_module(module.name)
from heretic_ds.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""A program that imports the package and runs a command where the kernel sets no limits, without DeepSpeed and without
what not every system has."""


def at_import(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that are imported as soon as a module is."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        found |= at_import(node)
    return found


@pytest.mark.parametrize(("name", "file"), files(), ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_needs_what_only_some_systems_have(name: str, file: Path) -> None:
    assert not at_import(ast.parse(file.read_text(encoding="utf-8"))) & {*OF_SOME_SYSTEMS}


def test_a_whole_job_runs_as_on_a_mac(tmp_path: Path) -> None:
    few = [f"prompts.{kind}.{part}.slice=0:20" for kind in ("target", "baseline") for part in ("train", "eval")]
    demo = ("experiment=demo", "search.trials=2", "search.startup_trials=2", "run.interactive=false", "run.dir=run")
    ended = subprocess.run(
        [sys.executable, "-c", AS_ON_A_MAC, *demo, *few],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file() and (tmp_path / "run" / "report.html").is_file()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.sys, "platform", "win32")


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("start", [cli.main, launch])
def test_windows_is_told_in_one_sentence(start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(["some/model"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("heretic-ds: heretic-ds runs on Linux and macOS, and this is Windows; ")
    assert said.err.count("\n") == 1 and said.out == ""


@pytest.mark.usefixtures("windows")
def test_windows_is_told_to_programs_too() -> None:
    library = sys.modules.pop("heretic_ds.library", None)
    try:
        with pytest.raises(UserError, match="this is Windows"):
            importlib.import_module("heretic_ds.library")
    finally:
        if library is not None:
            sys.modules["heretic_ds.library"] = library


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_DEEPSPEED", "no_such_package")


@pytest.mark.usefixtures("without_deepspeed")
def test_ranks_cannot_be_started_without_deepspeed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^starting ranks " + DEEPSPEED):
        make_plan(Launch(ranks=2), tmp_path)


@pytest.mark.usefixtures("without_deepspeed")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("capture=zero3", "^capture=zero3 "),
        ("evaluate=expert_parallel", "^evaluate=expert_parallel "),
    ],
)
def test_placements_say_that_they_need_deepspeed(override: str, said: str, evaluated) -> None:
    with pytest.raises(UserError, match=said + DEEPSPEED):
        evaluated(override)


def test_an_export_does_not_ask_for_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="transformers asks for DeepSpeed where accelerate is installed")
    families.save("llama", tmp_path / "model")
    loaded = load_weights(open_model(ModelChoice(path=str(tmp_path / "model"), device="cpu")))
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    asked: list[str] = []

    class Noting:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            if name == "deepspeed":
                asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Noting, *sys.meta_path])
    export_model(loaded, tmp_path / "out", "# card\n", {"schema": 1})
    assert asked == [] and "deepspeed" not in sys.modules
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_deepspeed_that_was_imported_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ModuleType("deepspeed")
    monkeypatch.setitem(sys.modules, "deepspeed", there)
    with needs.without_deepspeed():
        assert sys.modules["deepspeed"] is there
    monkeypatch.delitem(sys.modules, "deepspeed")
    with needs.without_deepspeed(), pytest.raises(ImportError):
        importlib.import_module("deepspeed")
    assert "deepspeed" not in sys.modules
