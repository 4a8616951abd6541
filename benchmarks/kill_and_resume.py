"""Kills a search 20 times at random moments and compares its trials with those of one that was left alone.

Needs: nothing but the package; the model is the built-in demo model, on the CPU. Takes some minutes.
Leaves: ``benchmarks/results/kill_and_resume.json``. Ends with status 1 where a single number differs.

    python benchmarks/kill_and_resume.py [--kills 20] [--trials 40] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import keep

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "kill_and_resume.json"


def start(folder: Path, trials: int) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own. The batch size is fixed, as equal numbers need it."""
    words = ["experiment=demo", f"search.trials={trials}", f"run.dir={folder}", "generation.batch_size=32"]
    return subprocess.Popen(
        [sys.executable, "-m", "heretic_ds", *words, "run.interactive=false"],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command that nobody ends."""
    _, complaint = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the command ended with status {process.returncode}:\n{complaint.decode()}")


def finished_trials(folder: Path) -> int:
    """Trials that the journal holds."""
    journal = folder / "study.journal"
    return journal.read_bytes().count(b'"kl":') if journal.exists() else 0


def kill_once(folder: Path, trials: int, allowance: int, numbers: random.Random) -> dict[str, Any]:
    """Start the command and kill it: once in four times while it loads, else within its next trials."""
    before, began = finished_trials(folder), time.monotonic()
    process = start(folder, trials)
    if numbers.random() < 0.25:
        time.sleep(numbers.uniform(0, 8))
    else:
        wanted = before + numbers.randint(0, allowance)
        while finished_trials(folder) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(numbers.uniform(0, 1) if wanted > before else numbers.uniform(4, 12))
    ended_before = process.poll() is not None
    if not ended_before:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    after = finished_trials(folder)
    seconds = round(time.monotonic() - began, 2)
    return {"seconds": seconds, "trials_before": before, "trials_after": after, "ended_by_itself": ended_before}


def results_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs between two runs, times aside."""
    found = [key for key in ("baseline", "pareto", "selected", "verified") if one[key] != other[key]]
    if len(one["trials"]) != len(other["trials"]):
        found.append("number of trials")
    for ours, theirs in zip(one["trials"], other["trials"], strict=False):
        found += [f"trial {ours['index']}: {key}" for key in ours if key != "seconds" and ours[key] != theirs[key]]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    numbers = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        killed, whole = Path(place) / "killed", Path(place) / "whole"
        finish(start(whole, options.trials))
        kills = []
        for left in range(options.kills, 0, -1):
            allowance = max(1, round(1.5 * (options.trials - finished_trials(killed)) / (left + 1)))
            kills.append(kill_once(killed, options.trials, allowance, numbers))
            print(f"kill {len(kills)}: {kills[-1]}", flush=True)
        finish(start(killed, options.trials))
        different = differences(results_of(whole), results_of(killed))
        trials = len(results_of(whole)["trials"])
    report = {
        "what": "a search killed at random moments and gone on with, against one that was left alone",
        "seed": options.seed,
        "trials": trials,
        "kills": kills,
        "kills_that_hit": sum(not kill["ended_by_itself"] for kill in kills),
        "differences": different,
    }
    keep(RESULT, report)
    print(f"{report['kills_that_hit']} kills, {trials} trials, differences: {', '.join(different) or 'none'}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
