"""The pure parts of the benchmark of search quality: areas, losses, verdicts, objectives."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from heretic_ds.search.space import edit_of, search_space
from tests.conftest import benchmark


@pytest.fixture(scope="module")
def search_quality() -> ModuleType:
    return benchmark("search_quality")


@pytest.fixture(scope="module")
def objectives(search_quality: ModuleType) -> ModuleType:
    return sys.modules["search_objectives"]


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0.0),
        ([(0.5, 0.5)], 0.25),
        ([(0.5, 0.5), (0.6, 0.6)], 0.25),  # the second is dominated
        ([(0.5, 0.5), (0.25, 0.75), (0.25, 0.75)], 0.25 + 0.0625),
        ([(1.0, 0.0), (0.0, 1.0), (2.0, -1.0)], 0.0),  # on or behind the reference point
        ([(0.0, 0.0)], 1.0),
    ],
)
def test_hypervolume(search_quality: ModuleType, points: list[tuple[float, float]], area: float) -> None:
    assert search_quality.hypervolume(points, (1.0, 1.0)) == pytest.approx(area)
    assert search_quality.hypervolume(points[::-1], (1.0, 1.0)) == pytest.approx(area)


def test_hypervolume_is_the_share_of_random_points_that_are_dominated(search_quality: ModuleType) -> None:
    draw = np.random.default_rng(0)
    front, probes = draw.random((20, 2)), draw.random((40_000, 2))
    dominated = (front[None] <= probes[:, None]).all(-1).any(-1).mean()
    assert search_quality.hypervolume(map(tuple, front.tolist()), (1.0, 1.0)) == pytest.approx(dominated, abs=0.01)


def test_quality_is_whole_for_no_refusals_at_the_target_and_nothing_at_the_reference(
    search_quality: ModuleType,
) -> None:
    for measure in search_quality.MEASURES:
        assert search_quality.quality([(0.0, 0.001)], 0.01, measure) == pytest.approx(1.0)
        assert search_quality.quality([(0.0, 1.0), (1.0, 0.0)], 0.01, measure) == 0.0
    assert search_quality.quality([(0.0, 0.1)], 0.01, "logarithmic") == pytest.approx(0.5)
    assert search_quality.quality([(0.0, 0.1)], 0.01, "linear") == pytest.approx(0.9 / 0.99)


def test_a_loss_is_paired(search_quality: ModuleType) -> None:
    one = np.random.default_rng(0).uniform(0.2, 0.9, 30)
    loss = search_quality.paired_loss(one, one - 0.1 * one.mean())
    assert loss["mean_loss"] == pytest.approx(0.1, abs=1e-4) and loss["interval"] == pytest.approx([0.1, 0.1], abs=1e-4)
    assert loss["significantly_over_allowed"] and not loss["shown_to_be_allowed"]
    same = search_quality.paired_loss(one, one)
    assert same["shown_to_be_allowed"] and not same["significantly_over_allowed"]
    noisy = search_quality.paired_loss(one, one[::-1])
    assert not noisy["shown_to_be_allowed"] and not noisy["significantly_over_allowed"]


def test_the_verdict_counts_what_auto_may_choose(search_quality: ModuleType) -> None:
    def found(loss_at_16: float) -> dict:
        values = {"1": 0.8, "1 again": 0.2, "4": 0.8, "16": 0.8 * (1 - loss_at_16)}
        measures = {
            label: {m: dict.fromkeys(("40", "80"), value) for m in search_quality.MEASURES}
            for label, value in values.items()
        }
        return {("made", seed, label): measures[label] for seed in range(4) for label in values}

    rows = search_quality.compare(found(0.5))
    assert len(rows) == 2 * 2 * 4
    assert search_quality.verdict(rows, 8)["passes"]
    failed = search_quality.verdict(rows, 16)
    assert not failed["passes"] and len(failed["over"]) == 4 and all("T=16" in name for name in failed["over"])
    assert search_quality.verdict(search_quality.compare(found(0.01)), 16)["passes"]
    lines = search_quality.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "+50.00%" in lines[-1]


def test_the_analytic_objective_trades_refusals_for_kl(objectives: ModuleType) -> None:
    def score(weight: float, index: str) -> object:
        params = {name: 1.0 for name in search_space(32)} | {"direction_scope": index, "direction_index": 20.0}
        for part in ("attention", "mlp"):
            params |= {f"{part}.max_weight": weight, f"{part}.max_weight_position": 20.0}
            params[f"{part}.min_weight_distance"] = 18.0
        return objectives.Analytic(3).score(edit_of(params))

    nothing, little, much = (score(weight, "per layer") for weight in (0.0, 0.5, 1.0))
    assert nothing.kl == 0 and nothing.refusals == objectives.Analytic(3).original_refusals
    assert nothing.refusals >= little.refusals > much.refusals and 0 < little.kl < much.kl
    assert score(1.0, "global") != much and objectives.Analytic(4).score(edit_of_default()) != much


def edit_of_default() -> object:
    return edit_of({name: 1.0 for name in search_space(32)} | {"direction_scope": "global"})


def test_the_recorded_objective_gives_back_what_was_recorded(objectives: ModuleType) -> None:
    edits = objectives.random_edits(6, 40)
    draw = np.random.default_rng(1)
    trials = [
        {**edit.to_dict(), "refusals": int(draw.integers(0, 60)), "kl": float(draw.uniform(1e-5, 1e-3))}
        for edit in edits
    ]
    table = {"layers": 6, "original_refusals": 60, "trials": trials}
    model = objectives.Recorded(table, width=0.1, ridge=1e-9)
    for edit, trial in zip(edits, trials, strict=True):
        refusals, kl = model.predict(edit)
        assert refusals == trial["refusals"] and kl == pytest.approx(objectives.KL_SCALE * trial["kl"], rel=1e-3)


def test_a_study_of_the_project_runs_on_an_objective(
    search_quality: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_quality, "TRIALS", 12)
    monkeypatch.setattr(search_quality, "CHECKPOINTS", (6, 12))
    first, second = (search_quality.study("analytic", 0, 4, sampler_seed=repeat * 1000) for repeat in (0, 1))
    assert first != second
    found = search_quality.mean_of_studies("analytic", 0, "4", repeats=2)
    for measure in search_quality.MEASURES:
        assert 0 < found[measure]["6"] <= found[measure]["12"] < 1
        assert found[measure]["12"] == pytest.approx((first[measure]["12"] + second[measure]["12"]) / 2)
