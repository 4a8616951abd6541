"""Where the time of a search goes: forward passes, and everything around them.

Needs: nothing but the package; the model is the demo's. Takes a minute or two on a CPU.
Leaves: ``benchmarks/results/search_profile.json``, or the file that ``--result`` names.

    python benchmarks/search_profile.py [--trials 40] [--rounds 3] [--together auto] [--threads 1]

Seconds are exclusive: a part does not count what another part takes inside it. The processor's seconds are what a busy
machine changes less.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figures import keep

RESULT = Path(__file__).resolve().parent / "results" / "search_profile.json"
FORWARD, REST = "forward passes", "everything else"


class Parts:
    """Clocks of the parts of a search, of which one runs at a time."""

    def __init__(self) -> None:
        self.clock: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = (0.0, 0.0)

    def _stop(self) -> None:
        now = time.perf_counter(), time.process_time()
        if self._running:
            self.clock[self._running[-1]] += now[0] - self._since[0]
            self.processor[self._running[-1]] += now[1] - self._since[1]
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Let the clock of a part run."""
        self._stop()
        self._running.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._stop()
            self._running.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, running as a part."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return run


def watch(parts: Parts, run: Any, search: Any, objective: Any) -> None:
    """Replace the functions that a search calls by timed ones."""
    engine = run.engine
    for owner, attribute, name in (
        (engine.model, "forward", FORWARD),
        (engine._editor, "set_edit", "editing weights"),
        (objective, "_text_of", "tokens to text"),
        (search, "ask", "asking the sampler"),
        (search, "tell", "telling the study, its journal"),
        (run, "save", "writing results"),
        *((scorer, method, "scorers") for scorer in objective._scorers for method in ("score", "decided")),
    ):
        if getattr(owner, attribute, None) is not None:
            setattr(owner, attribute, parts.timed(name, getattr(owner, attribute)))
    if engine._outputs is not None:
        engine._outputs.assign = parts.timed("rows of trials", engine._outputs.assign)


def profile(trials: int, together: str, threads: int) -> dict[str, Any]:
    """One search, in this process."""
    import torch

    from heretic_ds import pipeline
    from heretic_ds.cli import compose
    from heretic_ds.stages import search as search_stage

    torch.set_num_threads(threads)
    parts, seen = Parts(), {}
    continue_search = search_stage.continue_search

    def watched(run: Any, search: Any, objective: Any) -> None:
        watch(parts, run, search, objective)
        with parts.part(REST):
            continue_search(run, search, objective)
        seen["batch_sizes"] = dict(run.engine.batch_sizes)

    with tempfile.TemporaryDirectory() as folder:
        words = ["experiment=demo", f"run.dir={folder}/run", f"search.trials={trials}", "run.interactive=false"]
        words += [f"search.trials_per_pass={together}"]
        search_stage.continue_search = watched
        try:
            pipeline.run(compose(words))
        finally:
            search_stage.continue_search = continue_search
    clock, processor = sum(parts.clock.values()), sum(parts.processor.values())
    return {
        "seconds_per_trial": {"clock": round(clock / trials, 4), "processor": round(processor / trials, 4)},
        "outside_forward_passes": {
            "clock": round(1 - parts.clock[FORWARD] / clock, 4),
            "processor": round(1 - parts.processor[FORWARD] / processor, 4),
        },
        "parts": {
            name: {
                "clock": round(parts.clock[name] / trials, 5),
                "processor": round(parts.processor[name] / trials, 5),
                "calls": round(parts.calls[name] / trials, 2),
            }
            for name, _ in parts.processor.most_common()
        },
        **seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="searches of each kind; the quickest counts")
    parser.add_argument("--together", nargs="+", default=["auto", "4"], help="values of search.trials_per_pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {together: [] for together in options.together}
    for _ in range(options.rounds):
        for together in options.together:  # in turns, so that the machine is as busy for one as for another
            found[together].append(profile(options.trials, together, options.threads))
    result = {
        "what": "seconds per trial of the demo's search by part, float32",
        "trials": options.trials,
        "rounds": options.rounds,
        "threads": options.threads,
        "trials_per_pass": {
            together: min(rounds, key=lambda each: each["seconds_per_trial"]["processor"])
            for together, rounds in found.items()
        },
    }
    print(json.dumps(keep(options.result, result), indent=1))


if __name__ == "__main__":
    main()
