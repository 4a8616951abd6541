"""Several directions over real ranks: found alike, and removed alike, in every placement that a process alone can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic_ds.world import World
from tests import families
from tests.distributed import rank_k_ranks as work
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed
RanksOf = Callable[[int], Ranks]

EVALUATING = [
    ("llama", "tensor_parallel", {"backend": "hf_plan"}),
    ("mixtral", "expert_parallel", {}),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in (
            ("gpt_oss", "tensor_parallel", {"backend": "hf_plan"}),
            ("gemma2", "tensor_parallel", {"backend": "autotp"}),
            ("llama", "fsdp", {}),
            ("gpt_oss", "fsdp", {}),
            ("gpt2", "pipeline", {}),
            ("mixtral", "replicated", {}),
        )
    ),
]
CAPTURING = [
    ("replicated", {}),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in (
            ("pipeline", {}),
            ("fsdp", {}),
            ("zero3", {}),
            ("tensor_parallel", {"backend": "hf_plan"}),
        )
    ),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved random model of a family, made once."""
    folder = tmp_path_factory.mktemp("models")

    def of_family(family: str) -> Path:
        path = folder / family
        return path if path.exists() else families.save(family, path)

    return of_family


@pytest.mark.parametrize(("family", "placement", "options"), EVALUATING)
def test_edits_are_those_of_a_process_alone(
    family: str, placement: str, options: dict[str, Any], ranks: RanksOf, saved: Callable[[str], Path]
) -> None:
    folder = str(saved(family))
    expected = work.score(World(), folder, "replicated", together=False)
    for found in ranks(2).run(work.score, folder=folder, placement=placement, **options):
        assert found["answers"] == expected["answers"]
        for row_norm, kls in expected["kl"].items():
            for kl, other in zip(kls, found["kl"][row_norm], strict=True):
                assert abs(other - kl) <= 1e-6 + 1e-4 * kl, row_norm
            assert found["weights"][row_norm] == pytest.approx(kls[0], rel=1e-3, abs=1e-6)
            assert sum(kl > 1e-3 for kl in kls) >= 2, "edits that do nothing show nothing"


@pytest.mark.parametrize("method", ["som", "median_of_means"])
@pytest.mark.parametrize(("placement", "options"), CAPTURING)
def test_directions_are_those_of_a_process_alone(
    placement: str, options: dict[str, Any], method: str, ranks: RanksOf, saved: Callable[[str], Path]
) -> None:
    folder = str(saved("llama"))
    expected = work.find(World(), folder, "replicated", method)
    assert expected.diagonal(dim1=-2, dim2=-1).sum(-1)[1:].round().tolist() == [3 if method == "som" else 1] * 2
    for found in ranks(2).run(work.find, folder=folder, placement=placement, method=method, **options):
        assert torch.allclose(found, expected, atol=1e-4)
