"""What a search loses by asking for several trials at a time: trials of one pass do not learn from each other.

    python benchmarks/search_quality.py [--seeds 30] [--together 1 4 8 16] [--result FILE]
    python benchmarks/search_quality.py --record      # scores edits of the demo model anew, for the recorded objective

Needs: the package alone. Takes some minutes on two cores. Leaves ``benchmarks/results/search_quality.json``, or
``--result``; ``--record`` leaves ``benchmarks/results/search_quality_trials.json``.

The project's own study asks and is told, 80 trials with ``search.startup_trials=10``, on objectives that cost nothing
(``search_objectives.py``): one recorded from the demo model, one analytic. For every seed the front of T = 1 is
compared with that of each other T on the same objective, each the mean of some studies, whose samplers have seeds of
their own; "1 again" is T = 1 with yet other seeds of the sampler, which shows how much of a difference is chance. The
measure is the hypervolume of refusals (share of the original's) and KL up to a fixed reference point, (1, 1 nat); once
with KL as it is, once with its logarithm, in which small KL counts as much as large. A KL below ``search.kl_target``
counts as that, since a search does not chase it further.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import keep
from search_objectives import PROBLEMS, TABLE, problem, record, searched

RESULT = Path(__file__).resolve().parent / "results" / "search_quality.json"
TRIALS, STARTUP_TRIALS, CHECKPOINTS = 80, 10, (40, 80)
REFERENCE = (1.0, 1.0)
"""Refusals as a share of the original's, and KL in nats, beyond which nothing counts."""
MEASURES = ("linear", "logarithmic")
ALLOWED_LOSS = 0.02
AGAIN = "1 again"

Point = tuple[float, float]


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """Area that at least one point dominates, up to the reference point; both coordinates are minimised."""
    area, lowest = 0.0, reference[1]
    for first, second in sorted(points):
        if first < reference[0] and second < lowest:
            area += (reference[0] - first) * (lowest - second)
            lowest = second
    return area


def quality(points: Sequence[Point], kl_target: float, measure: str) -> float:
    """Hypervolume of (share of refusals, KL), as a part of the largest possible."""
    least, most = kl_target, REFERENCE[1]
    clipped = [(share, max(kl, least)) for share, kl in points]
    if measure == "linear":
        return hypervolume(clipped, REFERENCE) / (REFERENCE[0] * (most - least))
    decades = math.log10(most / least)
    scaled = [(share, math.log10(kl / least) / decades) for share, kl in clipped]
    return hypervolume(scaled, (REFERENCE[0], 1.0)) / REFERENCE[0]


def study(name: str, seed: int, together: int, sampler_seed: int) -> dict[str, dict[str, float]]:
    """Quality of the front after each number of trials, from one study."""
    from heretic_ds.settings import SearchSettings

    logging.getLogger("heretic_ds").setLevel(logging.ERROR)
    settings = SearchSettings(
        trials=TRIALS, startup_trials=STARTUP_TRIALS, seed=sampler_seed, trials_per_pass=str(together)
    )
    points = searched(problem(name, seed), settings)
    return {
        measure: {str(count): quality(points[:count], settings.kl_target, measure) for count in CHECKPOINTS}
        for measure in MEASURES
    }


def mean_of_studies(name: str, seed: int, label: str, repeats: int) -> dict[str, dict[str, float]]:
    """Mean quality of several studies of one objective."""
    together, first = (1, repeats) if label == AGAIN else (int(label), 0)
    found = [study(name, seed, together, 1000 * repeat + seed) for repeat in range(first, first + repeats)]
    return {
        measure: {count: float(np.mean([each[measure][count] for each in found])) for count in map(str, CHECKPOINTS)}
        for measure in MEASURES
    }


def _job(job: tuple[str, int, str, int]) -> tuple[tuple[str, int, str], dict[str, dict[str, float]]]:
    return job[:3], mean_of_studies(*job)


def paired_loss(one: Sequence[float], many: Sequence[float], draws: int = 10_000) -> dict[str, Any]:
    """Mean loss of ``many`` beside ``one`` as a share of the latter's mean, with a 95 % bootstrap interval."""
    loss = (np.asarray(one) - np.asarray(many)) / np.mean(one)
    generator = np.random.default_rng(0)
    means = loss[generator.integers(0, len(loss), (draws, len(loss)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return {
        "mean_loss": round(float(loss.mean()), 5),
        "interval": [round(low, 5), round(high, 5)],
        "significantly_over_allowed": low > ALLOWED_LOSS,
        "shown_to_be_allowed": high < ALLOWED_LOSS,
    }


def compare(found: dict[tuple[str, int, str], dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row for every objective, measure, number of trials and T."""
    rows = []
    names, labels = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 2))
    for name in names:
        seeds = sorted({seed for of, seed, _ in found if of == name})
        for measure in MEASURES:
            for count in map(str, CHECKPOINTS):
                values = {label: [found[name, seed, label][measure][count] for seed in seeds] for label in labels}
                for label in labels:
                    row = {"objective": name, "measure": measure, "trials": int(count), "together": label}
                    row["mean_hypervolume"] = round(float(np.mean(values[label])), 5)
                    if label != "1":
                        row |= paired_loss(values["1"], values[label])
                    rows.append(row)
    return rows


def verdict(rows: Sequence[dict[str, Any]], most: int) -> dict[str, Any]:
    """Whether any T up to the largest that ``auto`` may choose loses significantly more than allowed."""
    counted = [row for row in rows if row["together"].isdigit() and 1 < int(row["together"]) <= most]
    over = [row for row in counted if row["significantly_over_allowed"]]
    open_ = [row for row in counted if not row["significantly_over_allowed"] and not row["shown_to_be_allowed"]]

    def names(chosen: Sequence[dict[str, Any]]) -> list[str]:
        return [f"{r['objective']}, {r['measure']}, {r['trials']} trials, T={r['together']}" for r in chosen]

    return {"largest_that_auto_chooses": most, "passes": not over, "over": names(over), "not_settled": names(open_)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = ["| objective | measure | trials | T | hypervolume | mean loss | 95 % interval |", "|" + "---|" * 7]
    for row in rows:
        loss = "- | -"
        if "mean_loss" in row:
            low, high = row["interval"]
            loss = f"{row['mean_loss']:+.2%} | {low:+.2%} to {high:+.2%}"
        lines.append(
            f"| {row['objective']} | {row['measure']} | {row['trials']} | {row['together']} | "
            f"{row['mean_hypervolume']:.4f} | {loss} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=4, help="studies of each seed and T, whose mean counts")
    parser.add_argument("--together", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--objectives", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--record", type=int, nargs="?", const=1000, metavar="EDITS")
    options = parser.parse_args(arguments)
    if options.record:
        record(options.record, TABLE)
        return 0
    from heretic_ds.stages.search import MOST_TRIALS

    labels = ["1", AGAIN, *(str(count) for count in options.together if count > 1)]
    jobs = [
        (name, seed, label, options.repeats)
        for name in options.objectives
        for seed in range(options.seeds)
        for label in labels
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = dict(pool.imap(_job, jobs, chunksize=2))
    rows = compare(found)
    result = {
        "what": "hypervolume of the front of refusals and KL, T trials asked for together beside one at a time",
        "trials": TRIALS,
        "startup_trials": STARTUP_TRIALS,
        "seeds": options.seeds,
        "studies_a_seed": options.repeats,
        "reference_point": REFERENCE,
        "allowed_loss": ALLOWED_LOSS,
        "objectives": {name: problem(name, 0).described() for name in options.objectives},
        "verdict": verdict(rows, MOST_TRIALS),
        "rows": rows,
    }
    keep(options.result, result)
    print(table(rows))
    print(json.dumps(result["verdict"], indent=1))
    return 0 if result["verdict"]["passes"] else 1


if __name__ == "__main__":
    sys.exit(main())
