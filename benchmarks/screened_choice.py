"""How soon a screened search has what a direct one ends with, on analytic problems, by how it picks what is scored.

    python benchmarks/screened_choice.py [--seeds 60] [--trials 24] [--candidate 0.08] [--result FILE]

Needs: the package alone. Takes some minutes on two cores. Leaves ``benchmarks/results/screened_choice.json``, or
``--result``.

The project's own searches run on :class:`Screenable` problems, whose scores cost nothing: a trial counts as one unit of
time, a candidate as ``--candidate`` of one. Measured is the time until the screened search's trials dominate the area
that the direct search's have at its end, as a share of the direct search's time (a search that never gets there counts
as 1.5), and by how much the areas differ when the direct search ends. Rows are variants of the choice, one change each;
*true scores* knows what every candidate would be scored, so that it shows what the best of predictions would win.
"""

from __future__ import annotations

import argparse
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
from search_objectives import Analytic, strengths
from time_to_front import MEASURES, quality

RESULT = Path(__file__).resolve().parent / "results" / "screened_choice.json"
STARTUP = 12
NEVER = 1.5
TRUE = "true scores"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    TRUE: {},
    "hardly any deviations": {"choice._NODE_Q2": lambda nodes: nodes / 1000},
    "twice the first deviations": {"choice._SHARE_DEVIATION": 0.03, "choice._KL_DEVIATION": 0.1},
    "corrections believed sooner": {"choice._DOUBT": 0.1},
    "a narrower neighbourhood": {"choice._WIDTH": 0.08},
    "24 candidates at first": {"candidates.FIRST": 24},
    "32 candidates at first": {"candidates.FIRST": 32},
}
"""What is put in place of what in ``heretic_ds.search.screened``: a value, or a function of the one that is there."""

Point = tuple[float, float]


class Screenable(Analytic):
    """An analytic problem of 80 prompts whose edits have a refusal likelihood too.

    KL divergences are those of good edits of SmolLM2-135M-Instruct, hundredths of a nat, smaller than its parent's. The
    likelihood is that of an eighth of the prompts, drawn at random: a soft step at each one's threshold, shifted a
    little, on a floor, as that model has it where hardly anything is declined; the KL of a part of the prompts lies up
    to 12 % from that of all.
    """

    prompts = 80

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = np.random.default_rng([seed, 11])
        self._kl = draw.uniform(0.04, 0.12)
        self._softness = draw.uniform(0.02, 0.05)
        self._shift_P = draw.normal(0, 0.04, self.prompts)
        self._floor = draw.uniform(0, 0.15)
        self._part = draw.permutation(self.prompts)[: self.prompts // 8]

    def screen(self, edit: Any) -> Any:
        """What a candidate is compared by, as :class:`heretic_ds.search.trials.TrialScores`."""
        from heretic_ds.search.trials import TrialScores

        removed, strength = self.removed(edit), strengths(edit, self.layers).sum()
        threshold = (self._threshold_P + self._shift_P)[self._part]
        kept = 1 / (1 + np.exp((removed - threshold) / self._softness))
        likelihood = self._floor + (1 - self._floor) * float(kept.mean())
        return TrialScores(likelihood, self.score(edit).kl * math.exp(0.12 * math.sin(50 * removed + 7 * strength)))


def _settings(strategy: str, seed: int, trials: int) -> Any:
    from heretic_ds.settings import SearchSettings

    return SearchSettings(strategy=strategy, seed=seed, trials=trials, startup_trials=STARTUP)


def direct(seed: int, trials: int) -> list[Point]:
    """Scores of a direct search's trials."""
    from heretic_ds.search.study import Search

    problem = Screenable(seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings("direct", seed, trials)
        search = Search(Path(folder) / "study.journal", problem.layers, settings, problem.original_refusals, 1)
        while asks := search.ask():
            for ask in asks:
                search.tell(ask, problem.score(ask.edit), 1.0)
        return [(record.refusals / problem.original_refusals, record.kl) for record in search.records]


def screened(seed: int, trials: int, cost: float, variant: str) -> tuple[list[float], list[Point]]:
    """When each trial of a screened search ended, and its scores."""
    from heretic_ds.search.screened import candidates, choice
    from heretic_ds.search.study import Search

    problem, truth = Screenable(seed), {}
    modules = {"choice": choice, "candidates": candidates}

    def known(pool: Sequence[Any]) -> Any:
        share_N, kl_N = np.array([truth[each.likelihood, each.kl] for each in pool]).T
        return choice._Prediction(share_N, kl_N.clip(min=choice.LEAST_KL), np.zeros(len(pool)), 0.0)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for place, value in VARIANTS[variant].items():
            module, name = place.split(".")
            new = value(getattr(modules[module], name)) if callable(value) else value
            patches.enter_context(mock.patch.object(modules[module], name, new))
        if variant == TRUE:
            patches.enter_context(mock.patch.object(choice, "_predicted", known))
        settings, about = _settings("screened", seed, trials), (problem.layers, problem.original_refusals)
        pool = candidates.Candidates(Path(folder) / "screening.journal", about[0], settings, about[1], 1)
        search = Search(Path(folder) / "study.journal", about[0], settings, about[1], 1, None, pool)
        now, ended, points = 0.0, [], []
        while len(points) < trials:
            while asks := pool.ask(len(points)):
                found = [problem.screen(ask.edit) for ask in asks]
                for ask, each in zip(asks, found, strict=True):
                    scores = problem.score(ask.edit)
                    truth[each.refusals, each.kl] = scores.refusals / problem.original_refusals, scores.kl
                pool.tell(asks, found, 1.0)
                now += cost * len(asks)
            for ask in search.ask():
                scores = problem.score(ask.edit)
                search.tell(ask, scores, 1.0)
                now += 1.0
                ended.append(now)
                points.append((scores.refusals / problem.original_refusals, scores.kl))
    return ended, points


def compare(seed: int, trials: int, cost: float) -> dict[str, dict[str, tuple[float, float]]]:
    """By variant and measure the share of the direct search's time, and the areas' difference at its end."""
    logging.getLogger("heretic_ds").setLevel(logging.ERROR)
    beside, found = direct(seed, trials), {}
    for variant in VARIANTS:
        ended, points = screened(seed, trials, cost, variant)
        found[variant] = {}
        for measure in MEASURES:
            goal = quality(beside, measure)
            area = [quality(points[: at + 1], measure) for at in range(len(points))]
            there = next((time for time, each in zip(ended, area, strict=True) if each >= goal - 1e-9), math.inf)
            then = max((each for time, each in zip(ended, area, strict=True) if time <= trials), default=0.0)
            found[variant][measure] = NEVER if math.isinf(there) else there / trials, then - goal
    return found


def _job(job: tuple[int, int, float]) -> dict[str, dict[str, tuple[float, float]]]:
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
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--candidate", type=float, default=0.08, help="what a candidate costs, in trials")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    jobs = [(seed, options.trials, options.candidate) for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = rows_of(pool.map(_job, jobs, chunksize=1))
    keep(
        options.result,
        {
            "what": "share of a direct search's time after which a screened one dominates as much, analytic problems",
            "seeds": options.seeds,
            "trials": options.trials,
            "a_candidate_in_trials": options.candidate,
            "never_counts_as": NEVER,
            "variants": {
                name: {place: "a thousandth" if callable(value) else value for place, value in changes.items()}
                for name, changes in VARIANTS.items()
            },
            "rows": rows,
        },
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
