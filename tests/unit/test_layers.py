"""The house rules of imports: dependencies point down, placements do not know each other, libraries stay put.

Read from the sources by `ast`, so that an import inside a function counts too; only those for type checkers do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "heretic_ds"

LAYERS = (
    {"__main__", "cli", "launching"},
    {"pipeline", "library"},
    {"stages"},
    {"planner", "report", "terminal", "tracking", "harness"},
    {"search", "export", "verifying"},
    {"placements"},
    {"job"},
    {"runner"},
    {"edits", "directions"},
    {"prompts", "checkpoint"},
    {"anatomy", "scoring", "world", "run_folder", "fingerprint", "memory"},
    {
        "ablation",
        "geometry",
        "foreign",
        "settings",
        "errors",
        "heartbeat",
        "progress",
        "demo",
        "conf_files",
        "needs",
        "__init__",
    },
)
"""Top-level modules, the highest first. A module imports from its own layer and from lower ones."""

FORBIDDEN = {
    "foreign": ("torch", "transformers", "omegaconf", "hydra", "heretic_ds.settings"),
    "ablation": ("torch.distributed", "omegaconf", "hydra", "transformers"),
    "geometry": ("torch.distributed", "omegaconf", "hydra", "transformers", "heretic_ds.settings"),
    "runner": ("deepspeed", "heretic_ds.job", "heretic_ds.settings", "heretic_ds.placements"),
    "directions": ("deepspeed", "heretic_ds.job", "heretic_ds.settings"),
    "edits": ("deepspeed", "heretic_ds.job", "heretic_ds.settings"),
    "checkpoint": ("deepspeed", "heretic_ds.job", "heretic_ds.settings"),
}
"""What a room must not import."""

COMPOSED = {"tensor_pipeline": {"tensor_parallel", "pipeline"}}
"""Placements that are made of others, from outside."""

SEALED = ("deepspeed", "vllm")
"""Libraries that only placements import."""

LATE = ("datasets", "matplotlib")
"""Libraries that no module imports before it uses them: a run waits for whatever is imported before its first trial."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports at run time, by its full name."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                path = PACKAGE.parent / Path(*node.module.split("."), alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def at_once(file: Path) -> Iterator[str]:
    """Every module that is imported as soon as a file is."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def files() -> list[tuple[str, Path]]:
    """All modules of the package by name, without its own."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), file))
    return found


def within(name: str, module: str) -> bool:
    """Whether a module is the named one or lies in it."""
    return name == module or name.startswith(module + ".")


def offences(name: str, file: Path) -> Iterator[str]:
    """What is wrong with the imports of one module."""
    rank = {part: level for level, layer in enumerate(LAYERS) for part in layer}
    room = name.split(".")[0]
    if room not in rank:
        yield f"{name}: {room} is in no layer"
        return
    for module in at_once(file):
        if any(within(module, library) for library in LATE):
            yield f"{name} imports {module} before it is used"
    for module in imports(file):
        if any(within(module, other) for other in FORBIDDEN.get(room, ())):
            yield f"{name} must not import {module}"
        if room != "placements" and any(within(module, library) for library in SEALED):
            yield f"{name} imports {module}, which is for placements alone"
        if not within(module, "heretic_ds"):
            continue
        other = module.split(".")[1] if "." in module else "__init__"
        if rank.get(other, -1) < rank[room]:
            yield f"{name} imports {module} from a higher layer"
        mine, theirs = name.split(".")[1:2], module.split(".")[2:3]
        independent = {"base", "costs", "deepspeed"}.union(*(COMPOSED.get(part, ()) for part in mine))
        if room == other == "placements" and mine and theirs and mine != theirs and not {*theirs} <= independent:
            yield f"{name} imports another placement, {module}"


@pytest.mark.parametrize(("name", "file"), files(), ids=lambda value: value if isinstance(value, str) else "")
def test_dependencies_point_down(name: str, file: Path) -> None:
    """One room's imports."""
    assert not list(offences(name, file))


def test_offences_are_noticed(tmp_path: Path) -> None:
    """A module that breaks each rule once."""
    file = tmp_path / "wrong.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from heretic_ds.job import Job\n"
        "def late():\n    from heretic_ds.pipeline import run\n    import deepspeed.comm\n"
        "from heretic_ds.job import Job\n"
        "from matplotlib.figure import Figure\n"
    )
    assert list(offences("runner.wrong", file)) == [
        "runner.wrong imports matplotlib.figure before it is used",
        "runner.wrong must not import heretic_ds.job",
        "runner.wrong imports heretic_ds.job from a higher layer",
        "runner.wrong imports heretic_ds.pipeline from a higher layer",
        "runner.wrong must not import deepspeed.comm",
        "runner.wrong imports deepspeed.comm, which is for placements alone",
    ]
    file.write_text("from heretic_ds.placements.zero3 import Zero3\nfrom heretic_ds.placements import deepspeed\n")
    assert list(offences("placements.fsdp", file)) == [
        "placements.fsdp imports another placement, heretic_ds.placements.zero3"
    ]


def test_no_folder_and_no_file_is_crowded() -> None:
    """At most 14 files a folder and 350 lines a file."""
    folders = [PACKAGE, *(folder for folder in PACKAGE.rglob("*") if folder.is_dir())]
    assert {folder.name: n for folder in folders if (n := len(list(folder.glob("*.py")))) > 14} == {}
    assert {str(f): n for _, f in files() if (n := len(f.read_text().splitlines())) > 350} == {}
