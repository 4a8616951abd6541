"""Scores the trials of a finished run again, on any placement and any number of ranks, and compares.

    python benchmarks/rescore.py runs/demo experiment=demo
    deepspeed --num_gpus 2 --no_local_rank benchmarks/rescore.py runs/demo experiment=demo \\
        capture=zero3 evaluate=tensor_parallel

Two placements are compared by the scores of the same edits, not by two searches: rounding of 1e-8 in one KL changes
what the sampler suggests next. Needs what the run needed; leaves nothing but, with ``--json FILE``, its figures. Exit
status 1 where refusals differ, or a KL by more than 1e-6 + 1e-4 KL.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import keep

from heretic_ds.ablation import Edit
from heretic_ds.cli import compose
from heretic_ds.report.console import console_of, messages_to
from heretic_ds.stages.measure import capture_directions, find_response_prefix, measure_original
from heretic_ds.stages.opening import opened
from heretic_ds.world import World


def differences(recorded: list[dict[str, Any]], scored: list[tuple[float, float]]) -> list[str]:
    """One line for every trial whose refusals or KL are others than recorded."""
    lines = []
    for entry, (refusals, kl) in zip(recorded, scored, strict=True):
        if refusals != entry["refusals"] or abs(kl - entry["kl"]) > 1e-6 + 1e-4 * entry["kl"]:
            before = f"{entry['refusals']:g} refusals, KL {entry['kl']:.9g}"
            lines.append(f"trial {entry['index']}: {before} recorded; {refusals:g} refusals, KL {kl:.9g} here")
    return lines


def main(arguments: list[str]) -> int:
    """Compares; returns the exit status."""
    target = None
    if "--json" in arguments:
        at = arguments.index("--json")
        target, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    run_folder, *overrides = arguments
    results = json.loads((Path(run_folder) / "results.json").read_text(encoding="utf-8"))
    recorded = [entry for entry in results["trials"] if entry["state"] == "complete"]
    world = World.join()
    folder = world.decide(lambda: tempfile.mkdtemp(prefix="rescore_"))
    settings = compose([*overrides, f"run.dir={folder}/run", "run.interactive=false"])
    with messages_to(console_of(world)) as console, opened(settings, world, console) as run:
        find_response_prefix(run)
        capture_directions(run)
        objective = measure_original(run)
        scores = [objective.score([Edit.from_dict(entry)])[0] for entry in recorded]
        placed = run.results["world"]
    world.leave()
    if not world.decides:
        return 0
    found = [(score.refusals, score.kl) for score in scores]
    wrong = differences(recorded, found)
    largest = max(abs(kl - entry["kl"]) for entry, (_, kl) in zip(recorded, found, strict=True))
    print("\n".join(wrong) or f"all {len(recorded)} trials: equal refusals, KL within {largest:.2g} nats ({placed})")
    if target is not None:
        figures = {"trials": len(recorded), "different": wrong, "largest_kl_difference": largest, "world": placed}
        keep(target, figures)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
