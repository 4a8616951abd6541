"""This tree beside another commit's: the same trials of the same models, in turns, in one run.

Needs a checkout of the other commit; no network. Some minutes on two cores. Leaves
``benchmarks/results/against_commit.json``, or ``--result``.

    git worktree add /tmp/before <commit>
    python benchmarks/against_commit.py /tmp/before [--shape demo 30m 135m] [--turns N]

Each tree runs in a process of its own and computes only while it is asked. A turn scores one edit on both, the tree
that begins changing from turn to turn; answers stop once decided. Both have the same batch size, prompts and
threads. What counts is processor time, since other programs' work should not; scores have to agree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from against_heretic_models import CASES, edits
from against_heretic_worker import Worker
from figures import keep

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "against_commit.json"


def measure(name: str, other: Path, turns: int, folder: Path) -> dict[str, Any]:
    """One model: processor seconds a trial of both trees, their ratio, and peaks of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = 1
    subprocess.run([sys.executable, str(HERE / "against_heretic_models.py"), name, str(folder)], check=True)
    told = json.loads((folder / "case.json").read_text())
    workers = {}
    for tree, root in (("before", other.resolve()), ("now", HERE.parent)):
        os.environ["PYTHONPATH"] = str(root)
        script = root / "benchmarks" / "against_heretic_ours.py"
        workers[tree] = Worker(Path(sys.executable), script, threads, folder / f"{tree}.log", folder)
    given = told["case"]["batch_size"]
    try:
        for worker in workers.values():
            worker.ask("open", told=told, row_norm="full", batch_size=given, threads=threads)
            worker.ask("capture")
            worker.ask("original")
        taken: dict[str, list[float]] = {tree: [] for tree in workers}
        parts: dict[str, dict[str, float]] = {tree: {} for tree in workers}
        scores: dict[str, list[Any]] = {tree: [] for tree in workers}
        timed = edits(told["layers"], 1, seed=1) + edits(told["layers"], turns)
        for turn, edit in enumerate(timed):
            for tree in list(workers)[:: 1 if turn % 2 else -1]:
                reply = workers[tree].ask("score", edits=[edit], early_stop=True)
                if turn:  # the first warms up
                    taken[tree].append(reply["processor_seconds"])
                    scores[tree] += reply["result"]["scores"]
                    for part, seconds in reply["result"]["processor_parts"].items():
                        parts[tree][part] = round(parts[tree].get(part, 0.0) + seconds, 4)
        peaks = {tree: worker.ask("memory")["peak_bytes"] for tree, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    pairs = list(zip(scores["before"], scores["now"], strict=True))
    return {
        "turns": turns,
        "batch_size": given,
        "threads": threads,
        "processor_seconds": {tree: round(sum(each), 3) for tree, each in taken.items()},
        "parts": parts,
        "speed_of_now": round(sum(taken["before"]) / sum(taken["now"]), 4),
        "peak_bytes": peaks,
        "memory_of_now": round(peaks["now"] / peaks["before"], 4),
        "equal_refusals": sum(one["refusals"] == two["refusals"] for one, two in pairs),
        "largest_kl_difference": max(abs(one["kl"] - two["kl"]) for one, two in pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of the other commit")
    parser.add_argument("--shape", nargs="+", choices=CASES, default=["demo", "30m"])
    parser.add_argument("--turns", type=int, default=0, help="0: 16 for the demo, else 6")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(options.other), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    found: dict[str, Any] = {"before": commit, "models": {}}
    with tempfile.TemporaryDirectory(prefix="against_commit_") as folder:
        for name in options.shape:
            turns = options.turns or (16 if name == "demo" else 6)
            found["models"][name] = measure(name, options.other, turns, Path(folder) / name)
            print(name, json.dumps(found["models"][name]), flush=True)
            keep(options.result, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
