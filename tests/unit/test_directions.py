"""Means, directions and profiles."""

from __future__ import annotations

import pytest
import torch

from heretic_ds.ablation import (
    Profile,
    ResidualMeans,
    behaviour_directions,
    block_direction,
    through_norm,
    winsorize,
)


def test_running_mean_equals_the_mean_of_everything_in_float64():
    residual_BLD = torch.randn(37, 4, 8) * 1e3 + 1e5
    means = ResidualMeans()
    for batch in residual_BLD.split(5):
        means.update(batch)
    assert means.count == 37
    assert torch.allclose(means.mean(), residual_BLD.double().mean(0), rtol=1e-14)


def test_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no residuals"):
        ResidualMeans().mean()


def test_directions_are_unit_and_orthogonal_to_the_baseline():
    target_LD, baseline_LD = torch.randn(5, 16), torch.randn(5, 16)
    plain_LD = behaviour_directions(target_LD, baseline_LD, orthogonalize=False)
    difference_LD = (target_LD - baseline_LD).double()
    assert torch.allclose(plain_LD, difference_LD / difference_LD.norm(dim=-1, keepdim=True))
    kept_LD = behaviour_directions(target_LD, baseline_LD, orthogonalize=True)
    assert torch.allclose(kept_LD.norm(dim=-1), torch.ones(5, dtype=torch.float64))
    assert (kept_LD * baseline_LD).sum(-1).abs().max() < 1e-12
    assert (kept_LD * plain_LD).sum(-1).min() > 0


def test_equal_means_give_a_zero_direction_not_nan():
    mean_LD = torch.randn(3, 8)
    assert behaviour_directions(mean_LD, mean_LD, orthogonalize=True).abs().max() == 0


def test_winsorize_clamps_each_residual_to_its_own_quantile():
    residual_BLD = torch.randn(2, 3, 101, dtype=torch.float64)
    residual_BLD[0, 0, 0] = 1e4
    clamped_BLD = winsorize(residual_BLD, 0.9)
    for b in range(2):
        for entry in range(3):
            bound = residual_BLD[b, entry].abs().sort().values[90]
            assert torch.allclose(clamped_BLD[b, entry], residual_BLD[b, entry].clamp(-bound, bound))
    assert winsorize(residual_BLD, 1.0) is residual_BLD


def test_block_directions_own_interpolated_and_clamped():
    directions_LD = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    assert torch.equal(block_direction(directions_LD, 2, None), directions_LD[3])
    mixed = 0.75 * directions_LD[2] + 0.25 * directions_LD[3]
    assert torch.allclose(block_direction(directions_LD, 0, 1.25), mixed / mixed.norm())
    assert torch.allclose(block_direction(directions_LD, 0, 3.0), directions_LD[4])
    assert torch.allclose(block_direction(directions_LD, 0, 3.9), directions_LD[4])


def test_direction_through_a_norm_leaves_nothing_after_it():
    v_D = torch.nn.functional.normalize(torch.randn(16, dtype=torch.float64), dim=0)
    gain_D = torch.rand(16, dtype=torch.float64) + 0.2
    before_D = through_norm(v_D, gain_D)
    y_D = torch.randn(16, dtype=torch.float64)
    y_D -= before_D * (before_D @ y_D)
    assert abs(v_D @ (gain_D * y_D / y_D.square().mean().sqrt())) < 1e-14
    assert through_norm(v_D, None) is v_D


def test_profile_is_a_tent_that_ends():
    profile = Profile(max_weight=1.2, max_weight_position=4.5, min_weight=0.4, min_weight_distance=2.0)
    expected = [0.0, 0.0, 0.0, 1.2 - 0.75 * 0.8, 1.2 - 0.25 * 0.8, 1.2 - 0.25 * 0.8, 1.2 - 0.75 * 0.8, 0.0]
    assert [profile.weight(layer) for layer in range(8)] == pytest.approx(expected)
    assert Profile(1.0, 2.0, 0.5, 1.0).weight(3) == pytest.approx(0.5)
