"""How long a run takes before its first trial, and what with, beside its whole search.

Needs: the planted models of ``planted_models.py``, which are trained once, but for the demo; and the folder of a real
model (``python -m heretic_ds.demo.real_model`` makes it) for ``--real``. A minute a run on a CPU, half an hour and more
with a real model.
Leaves: ``benchmarks/results/short_start.json``, or the file that ``--result`` names; other cases in it stay.

    python benchmarks/short_start.py [--cases demo deep experts] [--real .models/SmolLM2-135M-Instruct] [--trials 40]

Each case is run twice, as the command does it, in new run folders: first with an empty cache folder, then with what the
first run has measured of model and machine. The run is ended after its search. The start begins with the process, so
that it counts imports, whose modules are compiled before, as an installation leaves them. ``imports`` is what importing
took, and is in no part. What is told by part is inclusive: ``capture: batch size`` is a part of ``capture``. The
processor's seconds are what a busy machine changes less. Another checkout of the package is measured where
``PYTHONPATH`` names it.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import keep
from time_to_front import words_of

RESULT = Path(__file__).resolve().parent / "results" / "short_start.json"
MOST = 0.08
"""Share of a whole run of 40 trials that may pass before its first."""
RUN_TRIALS = 40
COMMON = ("run.interactive=false", "export.max_kl=1000", "search.strategy=direct")
CASES = ("demo", "deep", "experts")
CLOCKS = ("", "_processor")
STAGES = ("opening", "loading", "response prefix", "capture", "the original's scores")
"""Parts of the start that depend on the model: to import and to compose settings takes as long whatever follows."""


class Imports:
    """Seconds, by clock and of the processor, that modules took to be imported, with those that they import."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        loader: Any = importlib.machinery.SourceFileLoader
        inner, depth = loader.exec_module, [0]

        def exec_module(own: Any, module: Any) -> None:
            began, depth[0] = (time.monotonic(), time.process_time()), depth[0] + 1
            try:
                inner(own, module)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    ended = time.monotonic(), time.process_time()
                    for clock, start, end in zip(CLOCKS, began, ended, strict=True):
                        self.seconds[clock] += end - start

        loader.exec_module = exec_module


class Clock:
    """Seconds, by clock and of the processor, of work in hand by what it is, and of what it is part of; without what
    was imported meanwhile."""

    def __init__(self, imports: Imports) -> None:
        self.seconds = {clock: Counter[str]() for clock in CLOCKS}
        self._imports = imports
        self._stack: list[str] = []

    def _now(self) -> tuple[float, ...]:
        imported = self._imports.seconds
        return time.monotonic() - imported[CLOCKS[0]], time.process_time() - imported[CLOCKS[1]]

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Work that lasts as long as the context."""
        self._stack.append(what)
        name = what if len(self._stack) == 1 else f"{self._stack[0]}: {what}"
        began = self._now()
        try:
            yield
        finally:
            self._stack.pop()
            for clock, start, end in zip(CLOCKS, began, self._now(), strict=True):
                self.seconds[clock][name] += end - start


def watch(file: Path, words: Sequence[str]) -> None:
    """One run in this process, whose start and search are timed; what is found goes to a file."""
    imports = Imports()
    import psutil

    born = psutil.Process().create_time()
    from heretic_ds import cli, progress
    from heretic_ds.cli import command

    clock, work, dispatch = Clock(imports), progress.work, command._dispatch

    @contextmanager
    def timed(what: str, *more: Any, **named: Any) -> Iterator[Any]:
        with clock.part(what), work(what, *more, **named) as made:
            yield made

    def now() -> dict[str, float]:
        return {"": time.time() - born, "_processor": time.process_time()}

    def dispatched(settings: Any) -> Any:
        from heretic_ds.world import World  # which settings have imported

        join = World.join

        def joined() -> Any:
            from heretic_ds.stages import search  # which the pipeline has imported

            continue_search = search.continue_search

            def searched(run: Any, *rest: Any) -> None:
                told = {f"before_first_trial{name}": seconds for name, seconds in now().items()}
                told |= {f"imports{name}": seconds for name, seconds in imports.seconds.items()}
                parts = {f"parts{name}": dict(clock.seconds[name]) for name in CLOCKS}
                began = now()
                continue_search(run, *rest)
                told |= {f"search{name}": seconds - began[name] for name, seconds in now().items()}
                rounded = {name: round(seconds, 2) for name, seconds in told.items()}
                parts = {name: {part: round(each, 2) for part, each in of.items()} for name, of in parts.items()}
                more = {"trials": len(run.records), "batch_sizes": dict(run.engine.batch_sizes)}
                file.write_text(json.dumps({**rounded, **parts, **more}))
                raise SystemExit(0)

            search.continue_search = searched
            return join()

        World.join = joined  # type: ignore[method-assign]
        return dispatch(settings)

    progress.work, command._dispatch = timed, dispatched  # type: ignore[assignment]
    cli.main(words)


def started(words: Sequence[str], cache: Path) -> dict[str, Any]:
    """A run in a process and a run folder of its own, with a cache folder to itself."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "told.json"
        command = [sys.executable, __file__, "--watch", str(result), *words, f"run.dir={folder}/run", *COMMON]
        subprocess.run(command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)}, stdout=sys.stderr)
        told: dict[str, Any] = json.loads(result.read_text())
    for clock in CLOCKS:
        search = told[f"search{clock}"] / told["trials"] * RUN_TRIALS
        before, imports = told[f"before_first_trial{clock}"], told[f"imports{clock}"]
        stages = sum(told[f"parts{clock}"].get(part, 0.0) for part in STAGES)
        told[f"share_of_stages{clock}"] = round(stages / (stages + search), 4)
        told[f"share{clock}"] = round(before / (before + search), 4)
        told[f"share_but_imports{clock}"] = round((before - imports) / (before - imports + search), 4)
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--real", type=Path, help="folder of a real model, one more case")
    parser.add_argument("--trials", type=int, default=RUN_TRIALS, help="trials of each run; a search of 40 is reckoned")
    parser.add_argument("--runs", nargs="+", choices=("first", "again"), default=["first", "again"])
    parser.add_argument("--name", default="now", help="what these figures are called in the result")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.result.read_text()) if options.result.exists() else {}
    cases: dict[str, Any] = found.get("cases", {})
    import heretic_ds

    compileall.compile_dir(Path(heretic_ds.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory() as place:
        words = {name: words_of(name) for name in options.cases}
        if options.real is not None:
            words["real"] = [*words_of("real"), f"model.path={options.real}", "generation.batch_size=0"]
        for name in words:
            cache, trials = Path(place) / f"cache-{name}", f"search.trials={options.trials}"
            for run in options.runs:
                told = started([*words[name], trials], cache)
                cases.setdefault(name, {}).setdefault(options.name, {})[run] = told
                shares = [f"{told[share + '_processor']:.1%}" for share in ("share", "share_of_stages")]
                shown = f"{told['before_first_trial_processor']} s, {shares[0]}; of its stages {shares[1]}"
                print(f"{name}, {run} run, processor, before the first trial: {shown}", flush=True)
            keep(options.result, {
                "what": "seconds before the first trial, and their share of a run of 40 trials up to its last",
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "most": MOST,
                "cases": cases,
            })  # fmt: skip
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watch(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
