"""Whether trials share forward passes, rows stop early, and passes over prompts start from what is known changes speed
and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from heretic_ds.engines.head_start import HeadStart
from tests.e2e.conftest import Heretic, Material, read_results

TRIALS = 8
WAYS = [(1, False, False), (1, True, False), (1, False, True), (4, False, False), (4, True, True)]
"""Trials in a pass, early stop, and reuse of what is known of prompts."""


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_ways_to_evaluate_trials_agree(
    heretic: Heretic, material: Material, tmp_path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """All trials are drawn at random, so that every way evaluates the same ones."""
    found: list[list[dict[str, Any]]] = []
    late_passes: list[int] = []
    begin = HeadStart._from_there

    def begin_late(prefill: HeadStart, trials: Any, *more: Any) -> Any:
        late_passes.append(trials.start)
        return begin(prefill, trials, *more)

    monkeypatch.setattr(HeadStart, "_from_there", begin_late)
    for together, early_stop, reuse in WAYS:
        run = tmp_path / f"run-{together}-{early_stop}-{reuse}"
        late_passes.clear()
        outcome = heretic(
            *material.words(
                material.model(family), f"run.dir={run}", f"search.trials={TRIALS}", f"search.startup_trials={TRIALS}",
                f"search.trials_per_pass={together}", f"generation.early_stop={early_stop}",
                f"generation.prefill_reuse={reuse}",
            )
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        assert (len(late_passes) >= 2 * TRIALS // together) is reuse
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
