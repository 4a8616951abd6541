"""Edits along several directions at once: against their definition, and in all forms against each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from heretic_ds.ablation import (
    ROW_NORMS,
    Ablation,
    Edit,
    Profile,
    aligned,
    block_direction,
    edit_weight,
    edit_weight_,
    low_rank_edit,
    orthonormal,
    output_operator,
    row_norms,
    row_overlaps,
    through_norm,
)
from heretic_ds.anatomy import find_anatomy
from heretic_ds.edits.adapters import make_adapter, worn
from heretic_ds.edits.outputs import OutputEdits
from heretic_ds.edits.weights import WeightEditor
from heretic_ds.export.adapter import resident_writer
from tests import families

EDIT = Edit(0.4, {"attention": Profile(0.9, 1.0, 0.3, 2.0), "mlp": Profile(1.2, 0.5, 0.2, 3.0)})
OTHER = Edit(None, {"attention": Profile(0.6, 0.0, 0.3, 2.0), "mlp": Profile(1.0, 1.0, 0.5, 3.0)})


def basis(*shape: int, seed: int = 0) -> Tensor:
    """Orthonormal rows [..., R, D], float64."""
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(vectors.transpose(-1, -2)).Q.transpose(-1, -2)


def by_definition(weight_DK: Tensor, basis_RD: Tensor, strength: float, row_norm: str) -> Tensor:
    """The dense reference: the projector times the matrix, rows brought back to their norms, in float64."""
    weight_DK = weight_DK.double()
    norms_D1 = torch.ones(len(weight_DK), 1, dtype=torch.float64)
    if row_norm != "none":
        norms_D1 = weight_DK.norm(dim=-1, keepdim=True)
    unit_DK = torch.where(norms_D1 > 0, weight_DK / norms_D1, 0.0)
    edited_DK = unit_DK - strength * (basis_RD.T @ basis_RD) @ unit_DK
    if row_norm == "full":
        edited_DK = torch.nn.functional.normalize(edited_DK, dim=-1)
    return norms_D1 * edited_DK


def ablation_of(model: torch.nn.Module, rank: int, row_norm: str, through: bool = False) -> Ablation:
    anatomy = find_anatomy(model)
    bases_LRD = aligned(basis(anatomy.n_blocks + 1, rank, anatomy.width, seed=rank))
    return Ablation(bases_LRD, row_norm, through)


@pytest.mark.parametrize("rank", [1, 2, 4, 7])
@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_weights_and_outputs_are_those_of_the_dense_projector(row_norm: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    weight_DK = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    weight_DK *= torch.rand(40, 1, generator=generator, dtype=torch.float64) + 0.2
    weight_DK[5] = 0.0
    basis_RD, x_BK = basis(rank, 40, seed=9), torch.randn(6, 60, generator=generator, dtype=torch.float64)
    for strength in (0.0, 0.7, 1.0, 1.3):
        expected_DK = by_definition(weight_DK, basis_RD, strength, row_norm)
        assert (edit_weight(weight_DK, basis_RD, strength, row_norm) - expected_DK).abs().max() < 1e-12
        norms_D = row_norms(weight_DK, row_norm)
        overlaps_RD = row_overlaps(weight_DK, norms_D, basis_RD) if row_norm == "full" else None
        operator = output_operator(norms_D, overlaps_RD, basis_RD, strength)
        assert (operator(x_BK @ weight_DK.T) - x_BK @ expected_DK.T).abs().max() < 1e-12


@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_experts_and_split_experts_are_edited_one_by_one(row_norm: str) -> None:
    experts_EDK = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    basis_RD = basis(4, 20)
    expected = torch.stack([by_definition(expert, basis_RD, 0.9, row_norm) for expert in experts_EDK])
    assert torch.allclose(edit_weight(experts_EDK, basis_RD, 0.9, row_norm), expected, atol=1e-12)
    for reduce in (None, lambda tensor: tensor):
        inplace = experts_EDK.clone()
        edit_weight_(inplace, basis_RD, 0.9, row_norm, reduce)
        assert torch.allclose(inplace, expected, atol=1e-12)
    stored_EKD = experts_EDK.transpose(-1, -2).contiguous()
    edit_weight_(stored_EKD.transpose(-1, -2), basis_RD, 0.9, row_norm)
    assert torch.allclose(stored_EKD.transpose(-1, -2), expected, atol=1e-12)
    narrow, kept = experts_EDK.bfloat16(), experts_EDK.bfloat16()
    edit_weight_(narrow, basis_RD, 0.9, row_norm)
    wide = edit_weight(kept, basis_RD, 0.9, row_norm)  # leaves what it is given
    assert torch.equal(narrow, wide.bfloat16()) and torch.equal(kept, experts_EDK.bfloat16())
    assert torch.allclose(wide.double(), expected, atol=0.05)


@pytest.mark.parametrize("row_norm", ROW_NORMS)
def test_which_basis_spans_the_subspace_makes_no_difference(row_norm: str) -> None:
    weight_DK, basis_RD = torch.randn(24, 30, dtype=torch.float64), basis(3, 24)
    turned_RD = basis(3, 3, seed=4) @ basis_RD
    edited_DK = edit_weight(weight_DK, basis_RD, 0.8, row_norm)
    assert torch.allclose(edit_weight(weight_DK, turned_RD, 0.8, row_norm), edited_DK, atol=1e-12)


def test_an_adapter_of_as_many_ranks_is_the_whole_change() -> None:
    weight_DK, basis_RD = torch.randn(24, 30, dtype=torch.float64), basis(3, 24)
    for row_norm in ("none", "pre"):
        part = low_rank_edit(weight_DK, basis_RD, 0.8, row_norm, rank=8)
        change_DK = by_definition(weight_DK, basis_RD, 0.8, row_norm) - weight_DK
        assert part.rank == 3 and part.left_out == 0.0
        assert torch.allclose(part.out_DR @ part.in_RK, change_DK, atol=1e-12)
        assert part.change == pytest.approx(change_DK.square().sum().item())


def test_orthonormal_rows_span_the_same_by_a_known_combination() -> None:
    vectors_RD = torch.randn(4, 10, dtype=torch.float64)
    unit_RD, made_RR = orthonormal(vectors_RD)
    assert torch.allclose(unit_RD @ unit_RD.T, torch.eye(4, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(made_RR @ vectors_RD, unit_RD, atol=1e-12)
    assert (made_RR.diagonal() > 0).all() and torch.allclose(made_RR, made_RR.tril())
    assert torch.allclose(unit_RD[0], vectors_RD[0] / vectors_RD[0].norm())  # the order of Gram and Schmidt
    assert not orthonormal(torch.zeros(4, 10, dtype=torch.float64))[0].any()
    with pytest.raises(ValueError, match="not independent"):
        orthonormal(torch.cat([vectors_RD, vectors_RD[:1] + vectors_RD[1:2]]))
    with pytest.raises(ValueError, match="not independent"):
        orthonormal(torch.randn(5, 3, dtype=torch.float64))


def test_neighbouring_bases_are_turned_towards_each_other_and_span_what_they_did() -> None:
    bases_LRD = basis(5, 3, 16)
    turned_LRD = aligned(bases_LRD)
    projector = lambda each: each.transpose(-1, -2) @ each  # noqa: E731
    assert torch.allclose(projector(turned_LRD), projector(bases_LRD), atol=1e-12)
    for before_RD, after_RD in itertools.pairwise(turned_LRD):
        product_RR = after_RD @ before_RD.T
        assert torch.allclose(product_RR, product_RR.T, atol=1e-12)
        assert torch.linalg.eigvalsh(product_RR).min() > -1e-12
        middle_RD = torch.lerp(before_RD, after_RD, 0.5)
        assert torch.linalg.svdvals(middle_RD).min() >= 0.5**0.5 - 1e-12
    # Whichever bases the subspaces came in, a subspace between two of them is the same.
    others_LRD = aligned(torch.stack([basis(3, 3, seed=i) @ each for i, each in enumerate(bases_LRD)]))
    for index in (0.3, 1.5, 2.9):
        between = [projector(block_direction(each, 0, index)) for each in (turned_LRD, others_LRD)]
        assert torch.allclose(*between, atol=1e-12)


def test_behind_a_norm_nothing_of_any_direction_is_left() -> None:
    gain_D, basis_RD = torch.rand(16, dtype=torch.float64) + 0.5, basis(3, 16)
    before_RD = through_norm(basis_RD, gain_D)
    assert torch.allclose(before_RD @ before_RD.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    output_D = torch.randn(16, dtype=torch.float64)
    output_D -= before_RD.T @ (before_RD @ output_D)
    assert (basis_RD @ (gain_D * output_D)).abs().max() < 1e-12


@pytest.mark.parametrize("row_norm", ROW_NORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_all_forms_of_a_model_agree(family: str, row_norm: str) -> None:
    """Weights edited, outputs edited one trial or several at a time, tables kept or made for the pass, an adapter."""
    model = families.build(family).double().eval()
    model.set_experts_implementation("eager")  # grouped products take no float64
    anatomy, ablation = find_anatomy(model), ablation_of(model, 3, row_norm, through=family == "gemma3")
    ids = torch.arange(3, 12)[None]
    editor, expected = WeightEditor(model, anatomy), []
    editor.prepare(ablation)
    for edit in (EDIT, OTHER, None):
        editor.set_edit(edit)
        expected.append(model(ids).logits[0])
    for budget in (None, 0):
        outputs = OutputEdits(model, anatomy, ablation, budget=budget)
        outputs.assign([1, 0, 2])
        with outputs.active([EDIT, OTHER, None]):
            found = model(ids.expand(3, -1)).logits
        assert torch.allclose(found, torch.stack([expected[trial] for trial in (1, 0, 2)]), atol=1e-9)
    if row_norm != "full":
        adapter = make_adapter(anatomy, ablation, EDIT, lambda writer: resident_writer(model, writer), rank=8)
        assert adapter.exact and adapter.rank == 3
        with worn(model, adapter):
            assert torch.allclose(model(ids).logits[0], expected[0], atol=1e-4)  # an adapter is float32
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)
