"""Residuals of single prompts on rank 0: every placement's against those of one process, in the prompts' order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic_ds.geometry.measures import measure
from heretic_ds.world import World
from tests import families
from tests.distributed.engines import LENGTHS, prompts
from tests.distributed.geometry_ranks import residuals
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed
RanksOf = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved random model of a family, made once."""
    folder = tmp_path_factory.mktemp("models")

    def of_family(family: str) -> Path:
        path = folder / family
        return path if path.exists() else families.save(family, path)

    return of_family


def one_rank(folder: Path, **more: Any) -> dict[str, Any]:
    return residuals(World(), str(folder), "replicated", **more)


PLACEMENTS = [
    ("llama", "replicated", {}),
    ("llama", "pipeline", {}),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in (
            ("llama", "tensor_parallel", {"backend": "hf_plan"}),
            ("llama", "fsdp", {}),
            ("llama", "zero3", {}),
            ("mixtral", "expert_parallel", {}),
            ("gemma3", "fsdp", {}),
        )
    ),
]


@pytest.mark.parametrize(("family", "placement", "options"), PLACEMENTS)
def test_two_ranks_give_the_residuals_and_numbers_of_one(
    family: str, placement: str, options: dict[str, Any], ranks: RanksOf, models: Callable[[str], Path]
) -> None:
    """A few prompts' residuals are under way at a time, so that they come in several parts."""
    folder = models(family)
    expected = one_rank(folder)
    row = expected["residuals"][:, 0].nbytes
    found, other = ranks(2).run(residuals, folder=str(folder), placement=placement, on_the_way=4 * row, **options)
    assert other["residuals"] is None  # rank 0 alone has them
    assert max(found["sizes"]) <= 4 * row and len(found["sizes"]) > 1
    assert torch.allclose(found["residuals"], expected["residuals"], rtol=0, atol=1e-5)
    assert torch.allclose(found["residuals"].double().mean(1), expected["means"], rtol=0, atol=1e-5)
    assert torch.allclose(found["means"], expected["means"], rtol=0, atol=1e-5)

    def numbers(residual_LND: torch.Tensor) -> list[dict[str, float | None]]:
        layers = measure((each[:4], each[4:]) for each in residual_LND.double())
        return [layer.to_dict() for layer in layers]

    for one, two in zip(numbers(expected["residuals"]), numbers(found["residuals"]), strict=True):
        assert {name: number is None for name, number in one.items()} == {name: n is None for name, n in two.items()}
        assert all(two[name] == pytest.approx(n, rel=1e-5, abs=1e-5) for name, n in one.items() if n is not None)


def test_one_process_in_parts_and_clamped(models: Callable[[str], Path]) -> None:
    """Whatever is under way at once, and with residuals clamped as for the means."""
    folder = models("llama")
    whole = one_rank(folder)
    parts = one_rank(folder, on_the_way=1)
    assert len(parts["sizes"]) == len(LENGTHS) and len(whole["sizes"]) == 1
    assert torch.allclose(parts["residuals"], whole["residuals"], rtol=0, atol=1e-5)
    assert not torch.allclose(whole["residuals"][-1, 0], whole["residuals"][-1, 1])
    clamped = one_rank(folder, quantile=0.8)
    assert torch.allclose(clamped["residuals"].double().mean(1), clamped["means"], rtol=0, atol=1e-5)
    assert clamped["residuals"].abs().amax() < whole["residuals"].abs().amax()


def test_more_ranks_than_prompts(ranks: RanksOf, models: Callable[[str], Path]) -> None:
    folder = models("llama")
    found, _ = ranks(2).run(residuals, folder=str(folder), placement="replicated", count=1)
    assert found["residuals"].shape[1] == 1 == len(prompts(1))
    assert torch.allclose(found["residuals"].double().mean(1), found["means"], rtol=0, atol=1e-5)
