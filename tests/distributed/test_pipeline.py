"""Models whose blocks lie on several real ranks say what the same models say whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import families
from tests.distributed import engines
from tests.distributed import pipeline_ranks as work

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("llama", 4)`: the folder of a tiny model with so many blocks, and what it says whole, in one process."""
    known: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}

    def of_family(family: str, layers: int = 2) -> tuple[str, dict[str, Any]]:
        if (family, layers) not in known:
            folder: Path = families.save(family, tmp_path_factory.mktemp(family), layers=layers)
            known[family, layers] = str(folder), engines.measure_replicated(folder)
        return known[family, layers]

    return of_family


def assert_same(found: dict[str, Any], expected: dict[str, Any], alike: bool) -> None:
    """``alike``: batches are those of the whole model, so that means are, to the last bit."""
    if alike:
        assert torch.equal(found["means"], expected["means"])
    torch.testing.assert_close(found["means"], expected["means"], rtol=1e-5, atol=1e-6)
    assert found["answers"] == expected["answers"]
    assert found["kl"].keys() == expected["kl"].keys()
    for name, kl in expected["kl"].items():
        assert abs(found["kl"][name] - kl) <= 1e-6 + 1e-4 * kl, name
        assert name == "original" or kl > 1e-3, "an edit that does nothing shows nothing"
    assert found["restored"] and found["released"]


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_two_stages_say_what_one_process_says(ranks, saved, microbatches):
    folder, expected = saved("llama")
    for found in ranks(2).run(work.measured, folder=folder, microbatches=microbatches):
        assert_same(found, expected, alike=microbatches == 1)
