"""What data parallel ranks cost: the processor's seconds of a search on one rank, and on two that share its prompts.

    python benchmarks/data_parallel.py [--result FILE] [--trials 6] [--rounds 3]

Needs: the package, two cores, no GPU and no network. Every search is a job of its own through DeepSpeed's launcher, one
thread a rank, `replicated`; jobs of one rank and of two take turns, and the cheapest of each kind counts. Models: the
demo's, and a random llama of some 30 million parameters, made anew in a temporary folder, that always answers with as
many tokens as it may. Leaves ``benchmarks/results/data_parallel.json`` and prints it.

Only the trials count: not the loading, not the capture, not what is learned of the prompts with the first trial, not
the launcher.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import keep
from placements import from_ranks, make_model

RESULT = Path(__file__).resolve().parent / "results" / "data_parallel.json"
MARK = "data parallel figures: "
RANDOM = ["prompts=demo", "scoring.markers=[e]", "generation.early_stop=false", "generation.max_new_tokens=32"]
"""For a model whose answers mean nothing: every answer that has an `e` in it counts as declined."""


def measure(arguments: list[str]) -> None:
    """What one rank does: the main job up to the end of its search; rank 0 prints every rank's figures."""
    from heretic_ds.ablation import Edit, Profile
    from heretic_ds.cli import compose
    from heretic_ds.report.console import console_of, messages_to
    from heretic_ds.stages.measure import capture_directions, find_response_prefix, measure_original
    from heretic_ds.stages.opening import opened
    from heretic_ds.stages.search import continue_search, open_search
    from heretic_ds.world import World

    world = World.join()
    folder = world.decide(lambda: tempfile.mkdtemp(prefix="data_parallel_"))
    settings = compose([*arguments, f"run.dir={folder}/run", "run.interactive=false", "search.startup_trials=10"])
    with messages_to(console_of(world)) as console, opened(settings, world, console) as run:
        find_response_prefix(run)
        capture_directions(run)
        objective = measure_original(run)
        search = open_search(run, objective)
        objective.score(
            [Edit(None, {"mlp": Profile(1.0, 1.0, 0.5, 1.0)})]
        )  # what is found once for a run does not count
        before = time.perf_counter(), time.process_time()
        continue_search(run, search, objective)
        figures = {"clock": time.perf_counter() - before[0], "processor": time.process_time() - before[1]}
        ranks = world.gather(figures)
        scores = [(trial["refusals"], trial["kl"]) for trial in run.results["trials"]]
    if world.decides:
        print(MARK + json.dumps({"ranks": ranks, "scores": scores}), flush=True)
    world.leave()


def launch(ranks: int, arguments: list[str]) -> dict[str, Any]:
    """Figures of one search on that many ranks."""
    found = from_ranks(__file__, ranks, arguments, MARK, seconds=1800)
    return {
        "processor_seconds": sum(rank["processor"] for rank in found["ranks"]),
        "seconds": max(rank["clock"] for rank in found["ranks"]),
        "scores": found["scores"],
    }


def compare(arguments: list[str], together: list[tuple[int, str]], rounds: int) -> list[dict[str, Any]]:
    """Figures for each (ranks, trials a pass), the first of which is what the others are compared with."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {key: [] for key in together}
    for _ in range(rounds):
        for key in together:
            found[key].append(launch(key[0], [*arguments, f"search.trials_per_pass={key[1]}"]))
    rows = []
    for (ranks, trials), jobs in found.items():
        best = min(jobs, key=lambda job: job["processor_seconds"])
        row = {"ranks": ranks, "trials_per_pass": trials, **{k: round(best[k], 2) for k in best if k != "scores"}}
        base = rows[0] if rows else row
        rows.append(
            {**row, "processor_seconds_to_one_rank": round(row["processor_seconds"] / base["processor_seconds"], 3)}
        )
    return rows


def main() -> int:
    if "--rank" in sys.argv:
        measure(sys.argv[sys.argv.index("--rank") + 1 :])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--trials", type=int, default=6, help="of the random model; the demo does twice as many")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_parallel_") as folder:
        make_model(Path(folder), 512)
        random = [folder, *RANDOM, "model.dtype=float32", "model.device=cpu", f"search.trials={options.trials}"]
        demo = ["experiment=demo", f"search.trials={2 * options.trials}"]
        kinds = [(1, "auto"), (2, "auto"), (2, "1")]
        models = {
            "demo": compare(demo, kinds, options.rounds),
            "random llama, 30 M parameters": compare(random, kinds, options.rounds),
        }
    trials = {"demo": 2 * options.trials, "random": options.trials, "rounds": options.rounds}
    keep(options.result, {"models": models, "trials": trials, "threads_a_rank": 1})
    print(json.dumps(models, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
