"""How many trials share a pass, and how many candidates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heretic_ds.search.study import Search
from heretic_ds.settings import SearchSettings
from heretic_ds.stages.search import _trials_that_fill_batches, candidates_per_pass, trials_per_pass
from heretic_ds.world import World


def run_with(given: str, device: str = "cuda", rows: int = 256, most: int = 64, **measured: int) -> Any:
    """What the stage reads of a run, with 67 target eval prompts."""
    run = SimpleNamespace(
        settings=SimpleNamespace(search=SearchSettings(trials_per_pass=given)),
        engine=SimpleNamespace(max_edits_per_pass=most, batch_sizes={"generate": rows}, degree=1),
        job=SimpleNamespace(opened=SimpleNamespace(device=torch.device(device)), texts={"target.eval": ["?"] * 67}),
        world=World(),
        measured=dict(measured),
    )
    run.remember = run.measured.update
    return run


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (run_with("auto", rows=128), 2),  # 2 x 67 rows fill a batch of 128
        (run_with("auto"), 4),
        (run_with("auto", rows=512), 4),
        (run_with("auto", rows=4096), 4),
        (run_with("auto", rows=67), 1),
        (run_with("auto", rows=4), 1),
        (run_with("auto", device="cpu", rows=512), 1),
        (run_with("auto", most=1, rows=512), 1),
        (run_with("auto", rows=67, trials_per_pass=5), 5),  # an earlier run's
        (run_with("auto", most=1, trials_per_pass=5), 1),
        (run_with("16"), 16),
        (run_with("16", device="cpu"), 16),
        (run_with("3", most=1), 1),
        (run_with("2", most=0), 1),
        (run_with("2", trials_per_pass=5), 2),
    ],
)
def test_the_number_of_trials_in_a_pass(run, expected):
    assert trials_per_pass(run) == expected


@pytest.mark.parametrize(("ranks", "degree", "expected"), [(2, 1, 2), (4, 2, 2), (16, 1, 4), (2, 2, 1)])
def test_on_a_cpu_every_replica_gets_as_many_rows_as_one_alone(ranks, degree, expected):
    run = run_with("auto", device="cpu")
    run.world, run.engine.degree = World(size=ranks), degree
    assert _trials_that_fill_batches(run) == expected


@pytest.mark.parametrize(
    ("device", "rows", "each", "expected"),
    [("cuda", 29, 3, 1), ("cuda", 64, 3, 3), ("cuda", 256, 3, 5), ("cuda", 256, 8, 8), ("cpu", 256, 3, 1)],
)
def test_the_number_of_candidates_in_a_pass(device: str, rows: int, each: int, expected: int) -> None:
    """A candidate has 29 rows here: 9 of 67 target prompts, 20 of 100 others."""
    run = run_with("auto", device)
    run.settings.search.candidates = each
    run.engine.batch_sizes["kl"], run.job.texts["baseline.eval"] = rows, ["?"] * 100
    assert candidates_per_pass(run) == expected
    assert run.measured == {"candidates_per_pass": expected}


def test_what_was_found_is_remembered_and_only_that():
    run = run_with("auto")
    trials_per_pass(run)
    assert run.measured == {"trials_per_pass": 4}
    run = run_with("16")
    trials_per_pass(run)
    assert run.measured == {}


def test_the_search_asks_for_so_many(tmp_path):
    search = Search(tmp_path / "study.journal", 4, SearchSettings(), 10.0, trials_per_pass=5)
    assert len(search.ask()) == 5
