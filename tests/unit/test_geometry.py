"""Numbers about residuals: by hand, against direct definitions, and null where they are not defined."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from heretic_ds.errors import UserError
from heretic_ds.geometry import store
from heretic_ds.geometry.measures import (
    LayerGeometry,
    cosine,
    distances,
    geometric_median,
    measure,
    of_means,
    separation,
    silhouette,
)
from heretic_ds.geometry.projection import pca, spread_out
from heretic_ds.geometry.store import ResidualStore
from heretic_ds.stages.geometry import _stored
from heretic_ds.stages.opening import Run


def points(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_points(count: int, width: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def test_lengths_and_cosines_by_hand() -> None:
    """t = (3, 4), b = (3, 0), so r = (0, 4); the next layer's r is (2, 0)."""
    target, baseline = points((2, 4), (4, 4)), points((3, 1), (3, -1))
    layers = [(target, baseline), (points((2, 0), (2, 0)), points((0, 1), (0, -1)))]
    first, last = measure(layers)
    assert (first.target_norm, first.baseline_norm, first.direction_norm) == (5, 3, 4)
    assert first.cos_means == pytest.approx(3 / 5)
    assert first.cos_target_direction == pytest.approx(4 / 5)
    assert first.cos_baseline_direction == pytest.approx(0)
    assert first.cos_next == pytest.approx(0)
    assert (last.cos_next, last.cos_means) == (None, None)  # no layer comes after it; b is zero
    assert last.cos_target_direction == pytest.approx(1)
    known = of_means(*(torch.stack([layer[kind].mean(0) for layer in layers]) for kind in (0, 1)))
    assert all(getattr(first, name) == number for name, number in known[0].items())


def test_separation_by_hand() -> None:
    """On one axis: target at 4 and 6, baseline at 0 and 2. Without itself the target 4 has the mean 6 beside it, so the
    midpoint is 3.5 and 4 lies 0.5 beyond it; 6 lies 6 - 2.5 beyond; the baseline's mirror them."""
    d_prime, accuracy = separation(points((4, 0), (6, 0)), points((0, 0), (2, 0)))
    spread = torch.tensor([0.5, 3.5]).var().sqrt().item()
    assert accuracy == 1.0
    assert d_prime == pytest.approx((2 - -2) / spread)


def test_separation_of_noise_is_none_of_its_own_making() -> None:
    """In more dimensions than prompts every prompt is on its own mean's side; without itself it is half of them."""
    target, baseline = random_points(60, 2000, 1), random_points(60, 2000, 2)
    middle, along = (target.mean(0) + baseline.mean(0)) / 2, target.mean(0) - baseline.mean(0)
    assert ((target - middle) @ along > 0).all() and ((baseline - middle) @ along < 0).all()
    d_prime, accuracy = separation(target, baseline)
    assert accuracy is not None and 0.3 < accuracy < 0.7
    assert d_prime is not None and abs(d_prime) < 1


def test_separation_against_its_definition() -> None:
    target, baseline = random_points(9, 4, 3, 0.7), random_points(7, 4, 4)
    places: dict[str, list[float]] = {"target": [], "baseline": []}
    for kind, own, other, sign in (("target", target, baseline, 1), ("baseline", baseline, target, -1)):
        for index, point in enumerate(own):
            mean = torch.cat([own[:index], own[index + 1 :]]).mean(0)
            along = sign * (mean - other.mean(0))
            places[kind].append(float((point - (mean + other.mean(0)) / 2) @ along / along.norm()))
    t, b = (torch.tensor(places[kind], dtype=torch.float64) for kind in ("target", "baseline"))
    d_prime, accuracy = separation(target, baseline)
    assert d_prime == pytest.approx(float((t.mean() - b.mean()) / ((t.var() + b.var()) / 2).sqrt()), rel=1e-12)
    assert accuracy == pytest.approx(((t > 0).sum() + (b < 0).sum()).item() / 16)


def plain_silhouette(point_ND: Tensor, is_target: list[bool]) -> float:
    """Prompt by prompt, in the words of its definition."""
    found = []
    for i, point in enumerate(point_ND):
        own = [
            float((point - point_ND[j]).norm()) for j in range(len(point_ND)) if is_target[j] == is_target[i] and j != i
        ]
        other = [float((point - point_ND[j]).norm()) for j in range(len(point_ND)) if is_target[j] != is_target[i]]
        if not own:
            found.append(0.0)
            continue
        a, b = sum(own) / len(own), sum(other) / len(other)
        found.append((b - a) / max(a, b) if max(a, b) else 0.0)
    return sum(found) / len(found)


@pytest.mark.parametrize("targets", [1, 2, 6, 11])
@pytest.mark.parametrize("far", [0.0, 300.0])
def test_silhouette_against_its_definition(targets: int, far: float) -> None:
    point_ND = random_points(12, 5, targets) + far
    point_ND[:targets] += 1.5
    is_target = [place < targets for place in range(12)]
    found = silhouette(distances(point_ND), torch.tensor(is_target))
    assert found == pytest.approx(plain_silhouette(point_ND, is_target), abs=1e-9)


def test_silhouette_by_hand() -> None:
    """Two pairs on a line at 0, 1 and 10, 11: the outer ones have a = 1, b = 10.5, the inner ones b = 9.5."""
    distance_NN = distances(points((10,), (11,), (0,), (1,)))
    expected = (9.5 / 10.5 + 8.5 / 9.5) / 2
    assert silhouette(distance_NN, torch.tensor([True, True, False, False])) == pytest.approx(expected)


def test_distances_of_equal_points_are_zero() -> None:
    """The products that they are computed from are not always the same to the last digit."""
    point_ND = (random_points(37, 513, 5) * 50 + 1000).float().double()
    distance_NN = distances(torch.cat([point_ND, point_ND]))
    assert (distance_NN.diagonal(37) == 0).all() and (distance_NN.diagonal() == 0).all()
    plain_NN = torch.cdist(point_ND, point_ND, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(distance_NN[:37, :37], plain_NN, rtol=1e-9)


def test_geometric_median_is_where_distances_are_least() -> None:
    point_ND = random_points(15, 6, 6)
    point_ND[0] += 1000  # which moves the mean by 67 in each dimension
    found_D = geometric_median(point_ND)

    def total(at_D: Tensor) -> float:
        return float((point_ND - at_D).norm(dim=-1).sum())

    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(200, 6, generator=generator, dtype=torch.float64) * 1e-3
    assert min(total(found_D + step_D) for step_D in steps) > total(found_D)
    assert found_D.norm() < 5 < point_ND.mean(0).norm()
    assert geometric_median(points((0, 0), (0, 0), (0, 0), (9, 9))).abs().max() < 1e-6  # on a point
    assert geometric_median(points((1, 2), (1, 2))).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("target", "baseline"),
    [
        (points((1, 2)), points((3, 1))),
        (points((1, 2)), points((1, 2))),
        (points((1, 2), (1, 2)), points((1, 2), (1, 2))),
        (points((0, 0), (0, 0)), points((0, 0))),
        (points((1, 0), (1, 0)), points((0, 1), (0, 1))),
        (points((1, 2), (2, 3), (5, 1)), points((1, 2), (2, 3), (5, 1))),
    ],
)
def test_undefined_numbers_are_null_and_all_others_finite(target: Tensor, baseline: Tensor) -> None:
    """One prompt of a kind, equal prompts, residuals of zero."""
    [found] = measure([(target, baseline)])
    numbers = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert all(number is None or math.isfinite(number) for number in numbers.values())
    same = torch.equal(target.mean(0), baseline.mean(0))
    assert (numbers["cos_target_direction"] is None) == same
    assert (numbers["accuracy"] is None) == (same or min(len(target), len(baseline)) < 2)
    assert LayerGeometry.from_dict(numbers).to_dict() == numbers
    projected = pca(torch.cat([target, baseline]), torch.arange(len(target) + len(baseline)) < len(target))
    assert projected.point_N2.isfinite().all() and projected.point_N2.shape[1] == 2


def test_equal_prompts_are_not_told_apart() -> None:
    """There is no direction between them."""
    rows = random_points(40, 3, 8)
    [found] = measure([(rows, rows.clone())])
    assert found.direction_norm == 0 and found.cos_next is None
    assert found.separability is None and found.accuracy is None
    assert found.silhouette is not None and found.silhouette < 0


def test_cosine_stays_within_its_bounds() -> None:
    direction = random_points(1, 500, 9)[0]
    assert cosine(direction, 3 * direction) == pytest.approx(1) and cosine(direction, 3 * direction) <= 1  # type: ignore[operator]
    assert cosine(direction, torch.zeros(500, dtype=torch.float64)) is None


def test_principal_components_against_svd() -> None:
    point_ND = random_points(30, 8, 10) * torch.tensor([9, 4, 1, 1, 1, 1, 1, 1])
    is_target_N = torch.arange(30) < 12
    point_ND[is_target_N, 0] += 5
    found = pca(point_ND, is_target_N)
    left, values, _ = torch.linalg.svd(point_ND - point_ND.mean(0), full_matrices=False)
    expected = left[:, :2] * values[:2]
    assert torch.allclose(found.point_N2.abs(), expected.abs(), atol=1e-9)
    assert found.explained == pytest.approx((values.square() / values.square().sum())[:2].tolist())
    assert found.point_N2[is_target_N, 0].mean() > found.point_N2[~is_target_N, 0].mean()


def test_blocks_to_draw_are_spread_and_end_with_the_last() -> None:
    assert spread_out(6, 12) == [0, 1, 2, 3, 4, 5]
    assert spread_out(80, 12)[0] == 0 and spread_out(80, 12)[-1] == 79 and len(spread_out(80, 12)) == 12
    assert spread_out(1, 12) == [0] and spread_out(5, 1) == [4]


def test_store_gives_back_what_came_in_any_order(tmp_path: Path) -> None:
    residual_LND = random_points(3 * 5 * 4, 1, 11).float().view(3, 5, 4)
    kept = ResidualStore(tmp_path, 3, 5, 4)
    for places in ([4, 1], range(0, 3, 2)):
        kept.put(places, residual_LND[:, list(places)])
    with pytest.raises(ValueError, match="1 prompts"):
        kept.layer(0)
    kept.put([3], residual_LND[:, [3]])
    assert all(torch.equal(kept.layer(entry), residual_LND[entry].double()) for entry in range(kept.entries))
    assert list(tmp_path.iterdir()) == []  # its file has no name


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for the residuals of 800 prompts, 2\.1 GB .*set run\.dir"):
        ResidualStore(tmp_path, 81, 800, 8192)
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_cannot_reserve_room_is_asked_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    monkeypatch.delattr(store.os, "posix_fallocate")
    kept = ResidualStore(tmp_path, 1, 2, 3)
    kept.put([0, 1], torch.ones(1, 2, 3))
    assert kept.layer(0).sum() == 6
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=23))
    with pytest.raises(UserError, match="no room for the residuals of 2 prompts"):
        ResidualStore(tmp_path, 1, 2, 3)


def test_stored_numbers_that_are_damaged_are_the_users_to_mend(tmp_path: Path) -> None:
    asked, run = {"projection": "pca"}, cast(Run, SimpleNamespace(path=tmp_path))
    numbers = dict.fromkeys(LayerGeometry.__dataclass_fields__, 1.0)
    drawn = {"block": 0, "explained": [0.5, 0.2], "target": [[1.0, 2.0]], "baseline": [[3.0, 4.0]]}
    whole = {"schema": 1, "asked": asked, "model": "m", "layers": [numbers], "projections": [drawn]}

    def read(content: object) -> object:
        (tmp_path / "geometry.json").write_text(json.dumps(content))
        return _stored(run, asked)

    assert read(whole) == whole and read({**whole, "asked": {}}) is None and read({}) is None
    for change in (
        {"layers": [{}]},
        {"layers": None},
        {"layers": [{**numbers, "silhouette": "x"}]},
        {"projections": [{**drawn, "target": [[1, 2, 3]]}]},
        {"projections": [{**drawn, "explained": 1}]},
    ):
        with pytest.raises(UserError, match=r"geometry\.json is damaged: .*; remove it, and it is measured anew"):
            read({**whole, **change})
    (tmp_path / "geometry.json").write_text('{"schema"')
    with pytest.raises(UserError, match=r"geometry\.json cannot be read as JSON.*remove it"):
        _stored(run, asked)
