"""Edits against a direct implementation, and their output-space form against their weight-space form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heretic_ds.ablation import (
    ROW_NORMS,
    Edit,
    Profile,
    edit_weight,
    edit_weight_,
    output_operator,
    row_norms,
    row_overlaps,
)


def direct_edit(weight_DK: torch.Tensor, v_D: torch.Tensor, strength: float, row_norm: str) -> torch.Tensor:
    """The three modes written row by row from their definitions, without the shared closed form."""
    rows = []
    if row_norm == "none":
        return weight_DK - strength * torch.outer(v_D, v_D @ weight_DK)
    unit_DK = torch.stack([row / row.norm() if row.norm() > 0 else row for row in weight_DK])
    projected_K = unit_DK.T @ v_D
    for row_K, unit_K, v in zip(weight_DK, unit_DK, v_D, strict=True):
        edited_K = unit_K - strength * v * projected_K
        if row_norm == "full" and row_K.norm() > 0:
            edited_K = edited_K / edited_K.norm()
        rows.append(row_K.norm() * edited_K)
    return torch.stack(rows)


def well_conditioned(weight_DK: torch.Tensor, v_D: torch.Tensor, strength: float, row_norm: str) -> bool:
    """Whether every row keeps enough of itself: normalising what rounding left of a row magnifies the rounding."""
    if row_norm != "full":
        return True
    rows_DK = weight_DK[weight_DK.norm(dim=-1) > 0]
    unit_DK = torch.nn.functional.normalize(weight_DK, dim=-1)
    kept_DK = unit_DK - strength * torch.outer(v_D, v_D @ unit_DK)
    return len(rows_DK) == 0 or kept_DK[weight_DK.norm(dim=-1) > 0].norm(dim=-1).min().item() > 0.05


def random_case(seed: int, width: int, inputs: int, zero_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_DK = torch.randn(width, inputs, dtype=torch.float64, generator=generator)
    weight_DK *= torch.rand(width, 1, dtype=torch.float64, generator=generator) * 3 + 0.05
    weight_DK[torch.randperm(width, generator=generator)[:zero_rows]] = 0.0
    v_D = torch.randn(width, dtype=torch.float64, generator=generator)
    return weight_DK, v_D / v_D.norm()


cases = given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 24),
    inputs=st.integers(3, 40),
    zero_rows=st.integers(0, 3),
    strength=st.one_of(st.just(0.0), st.just(1.0), st.floats(-0.5, 1.5)),
    row_norm=st.sampled_from(ROW_NORMS),
)


@cases
@settings(max_examples=150, deadline=None)
def test_closed_form_equals_the_definition(seed, width, inputs, zero_rows, strength, row_norm):
    weight_DK, v_D = random_case(seed, width, inputs, min(zero_rows, width - 1))
    assume(well_conditioned(weight_DK, v_D, strength, row_norm))
    expected = direct_edit(weight_DK, v_D, strength, row_norm)
    edited = edit_weight(weight_DK, v_D, strength, row_norm)
    assert (edited - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@cases
@settings(max_examples=150, deadline=None)
def test_output_space_equals_weight_space(seed, width, inputs, zero_rows, strength, row_norm):
    weight_DK, v_D = random_case(seed, width, inputs, min(zero_rows, width - 1))
    assume(well_conditioned(weight_DK, v_D, strength, row_norm))
    x_BK = torch.randn(5, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    norms_D = row_norms(weight_DK, row_norm)
    overlaps_D = row_overlaps(weight_DK, norms_D, v_D[None])[0] if row_norm == "full" else None
    operator = output_operator(norms_D, overlaps_D, v_D, strength)
    expected = x_BK @ edit_weight(weight_DK, v_D, strength, row_norm).T
    assert (operator(x_BK @ weight_DK.T) - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_zero_strength_changes_nothing(row_norm):
    weight_DK, v_D = random_case(0, 12, 7, 2)
    assert torch.allclose(edit_weight(weight_DK, v_D, 0.0, row_norm), weight_DK, rtol=1e-15, atol=0)


def test_full_strength_removes_the_direction():
    weight_DK, v_D = random_case(1, 16, 9, 0)
    assert (v_D @ edit_weight(weight_DK, v_D, 1.0, "none")).abs().max() < 1e-13


def test_full_keeps_row_norms_where_pre_does_not():
    weight_DK, v_D = random_case(2, 16, 9, 1)
    norms = weight_DK.norm(dim=-1)
    assert torch.allclose(edit_weight(weight_DK, v_D, 1.2, "full").norm(dim=-1), norms, atol=1e-13)
    assert not torch.allclose(edit_weight(weight_DK, v_D, 1.2, "pre").norm(dim=-1), norms, atol=1e-3)


def test_a_row_that_is_all_direction_becomes_zero():
    """One nonzero row along its own direction: nothing is left of it, and nothing becomes NaN."""
    weight_DK = torch.zeros(4, 6, dtype=torch.float64)
    weight_DK[2] = torch.randn(6, dtype=torch.float64)
    v_D = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert edit_weight(weight_DK, v_D, 1.0, "full").abs().max() < 1e-12


@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_experts_are_edited_one_by_one(row_norm):
    generator = torch.Generator().manual_seed(3)
    experts_EDK = torch.randn(3, 8, 5, dtype=torch.float64, generator=generator)
    v_D = torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64, generator=generator), dim=0)
    expected = torch.stack([direct_edit(expert, v_D, 0.9, row_norm) for expert in experts_EDK])
    assert torch.allclose(edit_weight(experts_EDK, v_D, 0.9, row_norm), expected, atol=1e-12)
    stored_EKD = experts_EDK.transpose(-1, -2).contiguous()
    edit_weight_(stored_EKD.transpose(-1, -2), v_D, 0.9, row_norm)
    assert torch.allclose(stored_EKD.transpose(-1, -2), expected, atol=1e-12)


def test_overlaps_interpolate_to_those_of_the_interpolated_direction():
    weight_DK, _ = random_case(4, 10, 6, 1)
    norms_D = row_norms(weight_DK, "full")
    pair_2D = torch.nn.functional.normalize(torch.randn(2, 10, dtype=torch.float64), dim=-1)
    mixed_D = torch.lerp(pair_2D[0], pair_2D[1], 0.3)
    table_2D = row_overlaps(weight_DK, norms_D, pair_2D)
    expected = row_overlaps(weight_DK, norms_D, (mixed_D / mixed_D.norm())[None])[0]
    assert torch.allclose(torch.lerp(table_2D[0], table_2D[1], 0.3) / mixed_D.norm(), expected, atol=1e-13)


@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_bfloat16_forms_stay_within_twice_the_rounding_of_the_product(row_norm):
    generator = torch.Generator().manual_seed(5)
    weight_DK = torch.randn(64, 128, generator=generator).bfloat16()
    v_D = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    x_BK = torch.randn(32, 128, generator=generator).bfloat16()
    exact_BD = x_BK.float() @ edit_weight(weight_DK, v_D, 1.0, row_norm).T
    rounding = ((x_BK @ weight_DK.T).float() - x_BK.float() @ weight_DK.float().T).norm() / exact_BD.norm()
    edited_DK = weight_DK.clone()
    edit_weight_(edited_DK, v_D, 1.0, row_norm)
    norms_D = row_norms(weight_DK, row_norm)
    overlaps_D = row_overlaps(weight_DK, norms_D, v_D[None])[0] if row_norm == "full" else None
    by_weight_BD = (x_BK @ edited_DK.T).float()
    by_output_BD = output_operator(norms_D, overlaps_D, v_D, 1.0)(x_BK @ weight_DK.T).float()
    for form_BD in (by_weight_BD, by_output_BD):
        assert (form_BD - exact_BD).norm() / exact_BD.norm() <= 2 * rounding


def test_edit_round_trips_through_plain_numbers():
    edit = Edit(2.5, {"attention": Profile(1.0, 3.0, 0.1, 2.0), "mlp": Profile(0.0, 2.0, 0.0, 1.0)})
    assert Edit.from_dict(edit.to_dict()) == edit
    assert edit.strength("attention", 3) == 1.0 and edit.strength("attention", 0) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("across", [False, True])
def test_an_edit_has_the_same_bits_whatever_the_threads_and_the_rows_at_a_time(dtype, across, monkeypatch):
    """Ranks that share out a checkpoint's files need not have equally many threads."""
    stored = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight_DK = stored.T if across else stored
    v_D = torch.nn.functional.normalize(torch.randn(weight_DK.shape[0], dtype=torch.float64), dim=0)
    expected_DK, threads = edit_weight(weight_DK, v_D, 1.2, "full").to(dtype), torch.get_num_threads()
    monkeypatch.setattr("heretic_ds.ablation.edit._NUMBERS_AT_ONCE", 7 * 300)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            edited_DK = stored.clone().T if across else stored.clone()
            edit_weight_(edited_DK, v_D, 1.2, "full")
            assert torch.equal(edited_DK, expected_DK)
    finally:
        torch.set_num_threads(threads)
