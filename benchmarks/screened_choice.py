"""How soon a screened search has what a direct one ends with, on problems that cost nothing, by how it is set.

    python benchmarks/screened_choice.py [--problem analytic] [--seeds 60] [--trials 24] [--result FILE]
    python benchmarks/screened_choice.py --problem real --seeds 48

Needs: the package alone. Takes some minutes on two cores. Leaves ``benchmarks/results/screened_choice.json``, or
``--result``, which keeps the other problem.

The project's own searches run on the problems of ``screened_objectives.py``: a trial counts as one unit of time, a
candidate as ``--candidate`` of one. Measured is the time until the screened search's trials dominate the area that the
direct search's have at its end, as a share of the direct search's time (a search that never gets there counts as 1.5),
and by how much the areas differ when the direct search ends. Rows are variants of the search, one change each, but for
the last; *true scores* knows what every candidate would be scored: what the best of predictions would win.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from figures import keep
from screened_objectives import PROBLEMS
from search_objectives import searched
from time_to_front import MEASURES, quality

RESULT = Path(__file__).resolve().parent / "results" / "screened_choice.json"
STARTUP = 12
NEVER = 1.5
TRUE = "true scores"
BEFORE = "as before: proposed by what was screened, 24 at first, 5 more a trial"


def _nothing(*_: Any) -> None:
    """What is known of scores where only screening counts."""


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    TRUE: {},
    "hardly any deviations": {"choice._NODE_Q2": lambda nodes: nodes / 1000},
    "twice the first deviations": {"choice._SHARE_DEVIATION": 0.03, "choice._KL_DEVIATION": 0.1},
    "corrections believed sooner": {"choice._DOUBT": 0.1},
    "a narrower neighbourhood": {"choice._WIDTH": 0.08},
    "no edit is like another": {"choice._ALIKE": 1e-6},
    "proposed by what was screened": {"candidates.known_scores": lambda _: _nothing},
    "16 candidates at first": {"candidates.FIRST": 16},
    "24 candidates at first": {"candidates.FIRST": 24},
    "40 candidates at first": {"candidates.FIRST": 40},
    "decades below the target count a quarter": {"area._BELOW": 0.25},
    "decades below the target count in full": {"area._BELOW": 1.0},
    "2 more candidates a trial": {"search.candidates": 2},
    "5 more candidates a trial": {"search.candidates": 5},
    BEFORE: {"candidates.known_scores": lambda _: _nothing, "candidates.FIRST": 24, "search.candidates": 5},
}
"""What is put in place of what in ``heretic_ds.search.screened``: a value, or a function of the one that is there; or a
setting."""

Point = tuple[float, float]


def _settings(strategy: str, seed: int, trials: int) -> Any:
    from heretic_ds.settings import SearchSettings

    return SearchSettings(strategy=strategy, seed=seed, trials=trials, startup_trials=STARTUP, trials_per_pass="1")


def screened(name: str, seed: int, trials: int, cost: float, variant: str) -> tuple[list[float], list[Point]]:
    """When each trial of a screened search ended, and its scores."""
    from heretic_ds.search.screened import area, candidates, choice
    from heretic_ds.search.study import Search

    problem, truth = PROBLEMS[name](seed), {}
    modules = {"area": area, "choice": choice, "candidates": candidates}

    def known(pool: Sequence[Any], *_: Any) -> Any:
        share_N, kl_N = np.array([truth[each.likelihood, each.kl] for each in pool]).T
        return choice.Prediction(share_N, kl_N.clip(min=choice.LEAST_KL), *np.zeros((2, len(pool))))

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        changes = dict(VARIANTS[variant])
        each = changes.pop("search.candidates", None)
        for place, value in changes.items():
            module, constant = place.split(".")
            new = value(getattr(modules[module], constant)) if callable(value) else value
            patches.enter_context(mock.patch.object(modules[module], constant, new))
        if variant == TRUE:
            for module in (choice, candidates):
                patches.enter_context(mock.patch.object(module, "predict", known))
        settings = _settings("screened", seed, trials)
        settings.candidates = settings.candidates if each is None else each
        about = (problem.layers, problem.original_refusals)
        pool = candidates.Candidates(Path(folder) / "screening.journal", about[0], settings, about[1], 1)
        search = Search(Path(folder) / "study.journal", about[0], settings, about[1], 1, None, pool)
        now, ended, points = 0.0, [], []
        while len(points) < trials:
            while asks := search.to_screen():
                found = [problem.screen(ask.edit) for ask in asks]
                for ask, each in zip(asks, found, strict=True):
                    scores = problem.score(ask.edit)
                    truth[each.refusals, each.kl] = scores.refusals / problem.original_refusals, scores.kl
                search.tell_screened(asks, found, 1.0)
                now += cost * len(asks)
            for ask in search.ask():
                scores = problem.score(ask.edit)
                search.tell(ask, scores, 1.0)
                now += 1.0
                ended.append(now)
                points.append((scores.refusals / problem.original_refusals, scores.kl))
    return ended, points


def compare(name: str, seed: int, trials: int, cost: float) -> dict[str, dict[str, tuple[float, float]]]:
    """By variant and measure the share of the direct search's time, and the areas' difference at its end."""
    logging.getLogger("heretic_ds").setLevel(logging.ERROR)
    beside, found = searched(PROBLEMS[name](seed), _settings("direct", seed, trials)), {}
    for variant in VARIANTS:
        ended, points = screened(name, seed, trials, cost, variant)
        found[variant] = {}
        for measure in MEASURES:
            goal = quality(beside, measure)
            area = [quality(points[: at + 1], measure) for at in range(len(points))]
            there = next((time for time, each in zip(ended, area, strict=True) if each >= goal - 1e-9), math.inf)
            then = max((each for time, each in zip(ended, area, strict=True) if time <= trials), default=0.0)
            found[variant][measure] = NEVER if math.isinf(there) else there / trials, then - goal
    return found


def _job(job: tuple[str, int, int, float]) -> dict[str, dict[str, tuple[float, float]]]:
    return compare(*job)


def rows_of(found: Sequence[Mapping[str, Mapping[str, tuple[float, float]]]]) -> list[dict[str, Any]]:
    """One row for every variant and measure; *faster* and *slower*: on how many problems it was, beside as it is."""
    rows = []
    first = next(iter(VARIANTS))
    mean: Callable[[Sequence[float]], float] = lambda values: round(float(np.mean(values)), 4)  # noqa: E731
    for variant in VARIANTS:
        for measure in MEASURES:
            share, more = zip(*(each[variant][measure] for each in found), strict=True)
            usual = [each[first][measure][0] for each in found]
            rows.append(
                {
                    "variant": variant,
                    "measure": measure,
                    "mean_share": mean(share),
                    "median_share": round(float(np.median(share)), 4),
                    "faster": sum(one < other for one, other in zip(share, usual, strict=True)),
                    "slower": sum(one > other for one, other in zip(share, usual, strict=True)),
                    "lower_at_the_end": sum(each < 0 for each in more),
                    "mean_difference_at_the_end": mean(more),
                }
            )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    titles = [title.replace("_", " ") for title in rows[0]]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *(f"| {' | '.join(str(value) for value in row.values())} |" for row in rows)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="analytic")
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--candidate", type=float, default=0.08, help="what a candidate costs, in trials")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    jobs = [(options.problem, seed, options.trials, options.candidate) for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = rows_of(pool.map(_job, jobs, chunksize=1))
    before = json.loads(options.result.read_text())["problems"] if options.result.exists() else {}
    settings = {"seeds": options.seeds, "trials": options.trials, "a_candidate_in_trials": options.candidate}
    keep(
        options.result,
        {
            "what": "share of a direct search's time after which a screened one dominates as much",
            "never_counts_as": NEVER,
            "variants": {
                name: {place: "see the script" if callable(value) else value for place, value in changes.items()}
                for name, changes in VARIANTS.items()
            },
            "problems": {**before, options.problem: {**settings, "rows": rows}},
        },
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
