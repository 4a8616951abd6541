"""This project's searches of one model for ``time_to_front.py``: when each trial was done.

    python time_to_front_worker.py FILE SEARCHES WORD...    # [[strategy, seed, trials], ...] in JSON; Hydra overrides

The process runs the stages of ``heretic-ds`` up to the search once, on one thread, and then each of the searches in a
folder of its own: they start from the same directions, the same measured batch sizes and the same original scores.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STARTED = [time.time(), 0.0]


def clocks() -> list[float]:
    """Seconds since the epoch, and processor seconds of this process."""
    return [time.time(), time.process_time()]


def one(run: Any, objective: Any, strategy: str, seed: int, trials: int, folder: Path) -> dict[str, Any]:
    """One search: its trials, and the clocks when it began and when each was done."""
    from heretic_ds.stages.search import continue_search, open_search

    settings = run.settings.search
    settings.strategy, settings.seed, settings.trials = strategy, seed, trials
    folder.mkdir()
    run.folder.journal, run.folder.candidates = folder / "study.journal", folder / "screening.journal"
    objective.screening = None
    begun, done = clocks(), []
    search = open_search(run, objective)
    tell = search.tell

    def watched(*args: Any, **kwargs: Any) -> Any:
        record = tell(*args, **kwargs)
        done.append((record, clocks()))
        return record

    search.tell = watched
    continue_search(run, search, objective)
    original = objective.original.refusals
    trials_done = [
        {"at": at, "share": record.refusals / original, "kl": record.kl, "edit": record.edit.to_dict()}
        for record, at in done
        if record.complete
    ]
    candidates = folder / "screening.journal"
    screened = candidates.read_text().count('"state"') if candidates.exists() else 0
    return {"strategy": strategy, "seed": seed, "search": begun, "trials": trials_done, "screened": screened}


def main(file: Path, searches: list[tuple[str, int, int]], words: list[str]) -> None:
    import torch

    from heretic_ds.cli import compose
    from heretic_ds.report.console import console_of, messages_to
    from heretic_ds.stages.measure import capture_directions, find_response_prefix, measure_original
    from heretic_ds.stages.opening import opened
    from heretic_ds.world import World

    torch.set_num_threads(1)
    world = World.join()
    settings = compose([*words, "run.interactive=false"])
    with messages_to(console_of(world)) as console, opened(settings, world, console) as run:
        find_response_prefix(run)
        capture_directions(run)
        objective = measure_original(run)
        ready = clocks()
        told: dict[str, Any] = {"started": STARTED, "ready": ready, "searches": []}
        for at, (strategy, seed, trials) in enumerate(searches):
            found = one(run, objective, strategy, seed, trials, file.parent / f"search-{at}")
            told["searches"].append(found)
            file.write_text(json.dumps(told))
            print(strategy, seed, len(found["trials"]), clocks()[1] - found["search"][1], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
