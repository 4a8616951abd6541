"""Methods of finding directions: what each takes of the residuals, and what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heretic_ds.ablation import behaviour_directions, winsorize
from heretic_ds.directions import METHODS, Found, Request
from heretic_ds.directions.means import dealt
from heretic_ds.directions.som import _grid, fit_map
from heretic_ds.errors import UserError
from heretic_ds.settings.directions import MANY
from heretic_ds.settings.directions import METHODS as NAMES
from heretic_ds.world import World

ENTRIES, WIDTH = 4, 24


class Residuals:
    """Stands in for an engine: a prompt is the number of its residuals."""

    def __init__(self, *kinds: Tensor) -> None:
        self._residual_NLD = torch.cat(kinds)

    def capture(self, prompts: Sequence[Sequence[int]], winsorize_quantile: float = 1.0) -> Tensor:
        return winsorize(self._of(prompts), winsorize_quantile).double().mean(0)

    def residuals(self, prompts, take, winsorize_quantile: float = 1.0) -> None:
        for places in (range(1, len(prompts), 2), range(0, len(prompts), 2)):  # in any order
            residual_BLD = winsorize(self._of([prompts[place] for place in places]), winsorize_quantile)
            if len(places):
                take(list(places), residual_BLD.transpose(0, 1).float())

    def _of(self, prompts) -> Tensor:
        return self._residual_NLD[[row[0] for row in prompts]]


def kinds(count: int = 60, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    """Target residuals in three heaps off the baseline's, [N, L+1, D] each; entry 0 is the same for all."""
    generator = torch.Generator().manual_seed(5)
    heap_3LD = torch.randn(3, ENTRIES, WIDTH, generator=generator)
    target = heap_3LD[torch.arange(count) % 3] + 2 + spread * torch.randn(count, ENTRIES, WIDTH, generator=generator)
    baseline = spread * torch.randn(count, ENTRIES, WIDTH, generator=generator) - 0.5
    target[:, 0] = baseline[:, 0] = 1.0
    return target, baseline


def find(name: str, target: Tensor, baseline: Tensor, **more) -> Found:
    rows = [[index] for index in range(len(target) + len(baseline))]
    request = Request(rows[: len(target)], rows[len(target) :], ENTRIES, WIDTH, **more)
    return METHODS[name]().find(Residuals(target, baseline), request, World())


def projector(basis: Tensor) -> Tensor:
    return basis.transpose(-1, -2) @ basis


def test_the_settings_name_the_methods_that_there_are() -> None:
    assert tuple(METHODS) == NAMES
    assert tuple(name for name, method in METHODS.items() if method.many) == MANY


def test_the_difference_of_means_is_what_it_was() -> None:
    target, baseline = kinds()
    found = find("mean_difference", target, baseline, winsorize_quantile=0.9)
    means = [winsorize(each, 0.9).double().mean(0) for each in (target, baseline)]
    assert torch.equal(found.directions_LRD[:, 0], behaviour_directions(*means, orthogonalize=True))
    assert torch.equal(found.target_LD, means[0]) and torch.equal(found.baseline_LD, means[1])


def test_one_wild_prompt_does_not_move_the_median_of_means() -> None:
    target, baseline = kinds()
    calm = {name: find(name, target, baseline).directions_LRD for name in ("mean_difference", "median_of_means")}
    target[7, 1:] = 1e4 * torch.randn(ENTRIES - 1, WIDTH, generator=torch.Generator().manual_seed(1))
    kept = {name: (find(name, target, baseline).directions_LRD * calm[name]).sum(-1)[1:] for name in calm}
    assert kept["mean_difference"].abs().max() < 0.6 and kept["median_of_means"].min() > 0.97


@pytest.mark.parametrize("groups", [3, 4, 9, 500])
def test_medians_are_those_of_the_means_of_groups(groups: int) -> None:
    target, baseline = kinds(10)
    found = find("median_of_means", target, baseline, groups=groups, orthogonalize=False)
    group_N = dealt(10, groups)
    means = [target[group_N == group].double().mean(0) for group in range(min(groups, 10))]
    assert all(abs(count - 10 / len(means)) < 1 for count in group_N.bincount().tolist())
    expected_LD = torch.quantile(torch.stack(means), 0.5, dim=0)
    assert torch.allclose(found.target_LD, expected_LD, atol=1e-12)
    difference_LD = torch.nn.functional.normalize(found.target_LD - found.baseline_LD, dim=-1)
    assert torch.allclose(found.directions_LRD[1:, 0], difference_LD[1:], atol=1e-12)


def test_a_map_of_one_unit_is_the_difference_of_means() -> None:
    target, baseline = kinds()
    one = find("som", target, baseline, rank=1).directions_LRD
    assert torch.allclose(one, find("mean_difference", target, baseline).directions_LRD, atol=1e-6)


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_directions_of_a_map_span_what_lies_between_the_heaps_and_the_baseline(
    orthogonalize: bool, tmp_path: Path
) -> None:
    target, baseline = kinds(300, spread=0.05)
    found = find("som", target, baseline, rank=3, orthogonalize=orthogonalize, folder=tmp_path)
    basis_LRD, centre_LD = found.directions_LRD, baseline.double().mean(0)
    assert basis_LRD.shape == (ENTRIES, 3, WIDTH) and not list(tmp_path.iterdir())
    assert not basis_LRD[0].any()  # where all prompts are alike
    identity = torch.eye(3, dtype=torch.float64).expand(ENTRIES - 1, 3, 3)
    assert torch.allclose(basis_LRD[1:] @ basis_LRD[1:].transpose(-1, -2), identity, atol=1e-12)
    for entry in range(1, ENTRIES):
        heaps = torch.stack([target[first::3, entry].double().mean(0) for first in range(3)]) - centre_LD[entry]
        if orthogonalize:
            unit_D = centre_LD[entry] / centre_LD[entry].norm()
            heaps -= (heaps @ unit_D)[:, None] * unit_D
            assert (basis_LRD[entry] @ unit_D).abs().max() < 1e-7
        left = heaps - heaps @ projector(basis_LRD[entry])
        assert (left.norm(dim=-1) / heaps.norm(dim=-1)).max() < 0.02


def test_a_map_is_the_same_again_and_whatever_the_order_of_prompts() -> None:
    target, baseline = kinds()
    state = torch.get_rng_state()
    first = find("som", target, baseline, rank=4).directions_LRD
    assert torch.equal(torch.get_rng_state(), state)  # a search's own random numbers are left alone
    torch.manual_seed(77)
    assert torch.equal(find("som", target, baseline, rank=4).directions_LRD, first)
    shuffled = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(2))]
    other = find("som", shuffled, baseline, rank=4).directions_LRD
    assert torch.allclose(projector(other), projector(first), atol=1e-6)


@pytest.mark.parametrize(("units", "shape"), [(2, (1, 2)), (4, (2, 2)), (5, (1, 5)), (6, (2, 3)), (16, (4, 4))])
def test_units_lie_on_a_grid_and_each_has_a_prompt(units: int, shape: tuple[int, int]) -> None:
    place_R2, columns = _grid(units)
    assert columns == shape[1] and place_R2.max(0).values.tolist() == [shape[0] - 1, shape[1] - 1]
    point_ND = torch.randn(units, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit_RD = fit_map(point_ND, units)  # no more prompts than units: each is nearest to another
    assert unit_RD.shape == (units, 40) and torch.cdist(point_ND, unit_RD).argmin(1).unique().numel() == units
    assert torch.linalg.matrix_rank(unit_RD) == units


def test_neighbours_on_the_grid_lie_side_by_side() -> None:
    """What a map has over heaps alone: points on a line are taken in order."""
    line_ND = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None] * torch.ones(1, 6, dtype=torch.float64)
    along_R = fit_map(line_ND, 5)[:, 0]
    assert (along_R.diff() > 0.2).all() or (along_R.diff() < -0.2).all()


def test_a_neighbour_s_prompts_count_a_little_to_the_end() -> None:
    """Two heaps, two units side by side, a last reach of 0.3: h = exp(-1 / (2 · 0.3²)) = 0.0039."""
    heaps_ND = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(20)[:, None] * torch.ones(1, 6)
    near = math.exp(-1 / (2 * 0.3**2))
    unit_R = fit_map(heaps_ND, 2)[:, 0].sort().values
    assert unit_R.tolist() == pytest.approx([-(1 - near) / (1 + near), (1 - near) / (1 + near)], rel=1e-9)


def test_prompts_too_few_or_too_alike_are_refused() -> None:
    target, baseline = kinds()
    with pytest.raises(UserError, match=r"ablation.rank is 4, but there are 3 target train prompts; .*rank=3 at most"):
        find("som", target[:3], baseline, rank=4)
    target[:, 2] = target[:1, 2]
    with pytest.raises(UserError, match=r"after block 1 the residuals .* lie in fewer directions"):
        find("som", target, baseline, rank=2)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_direction_is_told(name: str) -> None:
    target, baseline = kinds()
    assert find(name, target, baseline).is_finite and find(name, target, baseline).is_any
    if name != "som":  # whose units differ from a mean even of the same prompts
        assert not find(name, baseline, baseline).is_any
    target[3, 2, 1] = float("nan")
    assert not find(name, target, baseline).is_finite
