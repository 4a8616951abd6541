"""This project beside Heretic (PyPI ``heretic-llm``): the same trials of the same models, in turns, in one run.

Needs: Heretic in an environment of its own, which ``make bench-setup`` makes; no network. Takes some 50 minutes on two
cores, most of them for the largest model. Leaves ``benchmarks/results/against_heretic.json`` and ``.png``, or
``--result``; models go to a temporary folder.

    python benchmarks/against_heretic.py [--shape demo 30m 135m] [--threads N] [--result FILE]
    python benchmarks/against_heretic.py --shape 8b|1b [--folder FOLDER]    # on a CUDA device; 8b: 80 GB or more

Each tool runs in a process of its own and computes only while it is asked. A turn is: Heretic scores an edit, this
project scores it generating as many tokens, this project scores it stopping answers that are decided. Both load the
same folder, read the same prompt files, count the same markers, have the same threads and the same limit of tokens;
batches are of one size for both, or each tool's own best. Each finds its own directions. A trial is the edit, the KL
and the answers; neither's sampler runs. The first trial of each warms up and does not count. Where this project takes
several trials together, as it does on a GPU, a turn is that many edits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from against_heretic_models import CASES, edits
from against_heretic_report import OURS, STOPPING, THEIRS, TOOLS, agreement, aims, ratios, summary, table, write
from against_heretic_worker import Worker
from figures import machine

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "against_heretic.json"
HERETIC_PYTHON = HERE.parent / ".venv-heretic" / "bin" / "python"
BATCHES = (16, 32, 64, 128)
"""What Heretic's own best batch is chosen from; 128 is the most that it takes by itself."""

Reply = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One pair of processes."""

    row_norm: str
    own_batches: bool
    """Each tool has the batch size that it is fastest with, instead of the case's."""
    turns: int

    @property
    def name(self) -> str:
        return f"{self.row_norm}, {'own batches' if self.own_batches else 'same batches'}"


def cells(turns: int) -> list[Cell]:
    """What is measured of each model: mostly the default form of an edit, the others to compare their scores."""
    few = max(2, turns // 2)
    return [Cell("none", False, few), Cell("pre", False, few), Cell("full", False, turns), Cell("full", True, turns)]


class Pair:
    """Both tools at work on one cell."""

    def __init__(self, told: dict[str, Any], cell: Cell, threads: int, heretic_python: Path, folder: Path) -> None:
        self._told, self._cell, self._threads = told, cell, threads
        scripts = {
            THEIRS: (heretic_python, "heretic_worker.py"),
            OURS: (Path(sys.executable), "against_heretic_ours.py"),
        }
        self.workers = {
            tool: Worker(python, HERE / script, threads, folder / f"{cell.name}, {tool}.log", folder)
            for tool, (python, script) in scripts.items()
        }
        self.stages: dict[str, dict[str, Reply]] = {tool: {} for tool in self.workers}

    def close(self) -> None:
        """End both."""
        for worker in self.workers.values():
            worker.close()

    def begin(self) -> dict[str, Any]:
        """All that comes before the first trial; returns the batch sizes."""
        own, given = self._cell.own_batches, self._told["case"]["batch_size"]
        rows = {THEIRS: BATCHES[-1] if own else given, OURS: 0 if own else given}
        for stage in ("open", "capture", "original"):
            for tool, worker in self.workers.items():
                asked: dict[str, Any] = {}
                if stage == "open":
                    asked = {"told": self._told, "row_norm": self._cell.row_norm, "threads": self._threads}
                    asked["batch_size"] = rows[tool]
                self.stages[tool][stage] = worker.ask(stage, **asked)
        told = [self._told["counts"][f"{kind}_eval"] for kind in ("target", "baseline")]
        for tool, stages in self.stages.items():
            if (read := stages["original"]["result"]["prompts"]) != told:
                raise RuntimeError(f"{tool} evaluates {read} target and baseline prompts, not {told}")
        self.together: int = self.stages[OURS]["original"]["result"]["together"]
        return {
            THEIRS: self._best_batch() if own else given,
            OURS: self.stages[OURS]["original"]["result"]["batch_sizes"],
        }

    def _best_batch(self) -> int:
        """The batch size with which Heretic scores a trial in the fewest processor seconds."""
        worker, edit, taken = self.workers[THEIRS], edits(self._told["layers"], 1, seed=1), {}
        worker.ask("score", edits=edit)
        for rows in BATCHES:
            worker.ask("batches", rows=rows)
            taken[rows] = worker.ask("score", edits=edit)["processor_seconds"]
        best = min(taken, key=lambda rows: taken[rows])
        worker.ask("batches", rows=best)
        return best

    def take_turns(self) -> dict[str, list[Reply]]:
        """The tools' replies to the timed edits."""
        replies: dict[str, list[Reply]] = {tool: [] for tool in TOOLS}
        self._turn(edits(self._told["layers"], self.together, seed=1))
        timed = edits(self._told["layers"], self._cell.turns * self.together)
        for start in range(0, len(timed), self.together):
            for tool, reply in self._turn(timed[start : start + self.together]).items():
                replies[tool].append(reply)
        return replies

    def _turn(self, group: list[dict[str, Any]]) -> dict[str, Reply]:
        return {
            THEIRS: self.workers[THEIRS].ask("score", edits=group),
            OURS: self.workers[OURS].ask("score", edits=group),
            STOPPING: self.workers[OURS].ask("score", edits=group, early_stop=True),
        }


def measure(told: dict[str, Any], cell: Cell, threads: int, heretic_python: Path, folder: Path) -> dict[str, Any]:
    """One cell: both tools from their start to their last trial."""
    load_before = os.getloadavg()[0]
    pair = Pair(told, cell, threads, heretic_python, folder)
    try:
        batch_sizes = pair.begin()
        replies = pair.take_turns()
        memory = {tool: worker.ask("memory") for tool, worker in pair.workers.items()}
    finally:
        pair.close()
    scores = {tool: [score for reply in replies[tool] for score in reply["result"]["scores"]] for tool in TOOLS}
    taken = ("seconds", "processor_seconds", "peak_bytes")
    result = {
        "row_norm": cell.row_norm,
        "batch_sizes": batch_sizes,
        "trials_together": {THEIRS: 1, OURS: pair.together},
        "tools": {tool: summary(replies[tool], pair.together) for tool in TOOLS},
        "stages": {
            tool: {stage: {key: round(reply[key], 3) for key in taken} for stage, reply in stages.items()}
            for tool, stages in pair.stages.items()
        },
        "peak_bytes": {tool: reply["peak_bytes"] for tool, reply in memory.items()},
        "peak_device_bytes": {tool: reply["result"]["device"] for tool, reply in memory.items()},
        "original_refusals": {tool: stages["original"]["result"]["refusals"] for tool, stages in pair.stages.items()},
        "agreement": agreement(scores, cell.row_norm),
        "load_average": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "versions": {tool: stages["open"]["result"]["versions"] for tool, stages in pair.stages.items()},
    }
    return result | {"ratios": ratios(result)}


def run_case(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """What is known of one model after each of its cells."""
    threads = options.threads or (1 if name in ("demo", "tiny") else os.cpu_count() or 1)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "against_heretic_models.py"), name, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    told = json.loads((folder / "case.json").read_text())
    measured = {}
    for cell in cells(options.turns or (8 if name == "demo" else 4)):
        if not options.only or cell.name in options.only:
            measured[cell.name] = measure(told, cell, threads, options.heretic_python, folder)
            print(f"{name}, {cell.name}: {json.dumps(measured[cell.name]['ratios'])}", flush=True)
            yield {
                "model": {key: told["case"][key] for key in ("dtype", "device", "new_tokens", "config")},
                "prompts": told["counts"],
                "threads": threads,
                "aims": aims(name, measured),
                "cells": measured,
                "machine": machine(gpu=told["case"]["device"] == "cuda"),
            }


def obstacle(shapes: Sequence[str], heretic_python: Path) -> str | None:
    """Why the benchmark cannot run; None where it can."""
    if any(CASES[shape].device == "cuda" for shape in shapes):
        import torch

        if not torch.cuda.is_available():
            named = " ".join(shape for shape in shapes if CASES[shape].device == "cuda")
            return f"--shape {named} needs a CUDA device, and this machine has none that PyTorch can use"
    if not heretic_python.exists():
        return f"{heretic_python} does not exist; `make bench-setup` makes Heretic's environment"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=CASES, default=["demo", "30m", "135m"])
    parser.add_argument("--threads", type=int, default=0, help="of each tool; 0: 1 for the demo, else all cores")
    parser.add_argument("--turns", type=int, default=0, help="with the default edit; 0: 8 for the demo, else 4")
    parser.add_argument("--only", nargs="+", help="cells by name, such as 'full, own batches'")
    parser.add_argument("--folder", type=Path, help="keep models here instead of in a temporary folder")
    parser.add_argument("--heretic-python", type=Path, default=HERETIC_PYTHON)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if (why := obstacle(options.shape, options.heretic_python)) is not None:
        print(why, file=sys.stderr)
        return 2
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="against_heretic_") as temporary:
        for name in options.shape:
            for known in run_case(name, options, (options.folder or Path(temporary)).resolve() / name):
                found[name] = known
                write(options.result, found, list(CASES))
    print(table(found))
    for name, of_case in found.items():
        for aim in of_case["aims"]:
            print(f"{name}: {json.dumps(aim)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
