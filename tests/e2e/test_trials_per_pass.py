"""Whether trials share forward passes, and whether rows stop early, changes speed and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.e2e.conftest import Heretic, Material, read_results

TRIALS = 8


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ways_to_evaluate_trials_agree(heretic: Heretic, material: Material, tmp_path, family: str) -> None:
    """All trials are drawn at random, so that every way evaluates the same ones."""
    found: list[list[dict[str, Any]]] = []
    for together, early_stop in itertools.product((1, 4), ("true", "false")):
        run = tmp_path / f"run-{together}-{early_stop}"
        outcome = heretic(
            *material.words(
                material.model(family), f"run.dir={run}", f"search.trials={TRIALS}", f"search.startup_trials={TRIALS}",
                f"search.trials_per_pass={together}", f"generation.early_stop={early_stop}",
            )
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        results = read_results(run)
        found.append(results["trials"])
        assert max(trial["pass"] for trial in results["trials"]) == TRIALS // together - 1
    first = found[0]
    assert len({trial["refusals"] for trial in first}) > 1
    for trials in found[1:]:
        for trial, expected in zip(trials, first, strict=True):
            assert trial["profiles"] == expected["profiles"]
            assert trial["refusals"] == expected["refusals"]
            assert abs(trial["kl"] - expected["kl"]) <= 1e-6 + 1e-4 * expected["kl"]
