"""Many edits in one pass over real ranks, against one after another in the weights of a whole model."""

from __future__ import annotations

from typing import Any

import pytest

from tests import families
from tests.distributed import output_edits_ranks as work

pytestmark = pytest.mark.distributed

SPLIT = [
    ("llama", "autotp"), ("llama", "hf_plan"), ("gemma2", "autotp"), ("opt", "autotp"), ("olmo2", "hf_plan"),
    ("mixtral", "autotp"), ("gpt_oss", "hf_plan"), ("qwen3_next", "hf_plan"), ("deepseek_v3", "autotp"),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("llama")`: the folder of a tiny model, and its scores by edited weights."""
    known: dict[str, Any] = {}

    def of_family(family: str) -> Any:
        if family not in known:
            folder = families.save(family, tmp_path_factory.mktemp(family))
            known[family] = folder, work.score_one_by_one(folder)
        return known[family]

    return of_family


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["answers"] == expected["answers"]
    for row_norm, kls in expected["kl"].items():
        for kl, other in zip(kls, found["kl"][row_norm], strict=True):
            assert abs(other - kl) <= 1e-6 + 1e-4 * kl, row_norm
        assert sum(kl > 1e-3 for kl in kls) >= 2, "edits that do nothing show nothing"


@pytest.mark.parametrize(("family", "backend"), SPLIT)
def test_split_writers(ranks, saved, family, backend):
    folder, expected = saved(family)
    for found in ranks(2).run(work.score_split, folder=str(folder), backend=backend):
        assert_same(found, expected)


@pytest.mark.parametrize(("family", "backend"), [("llama", "hf_plan"), ("mixtral", "hf_plan")])
def test_edits_of_outputs_add_no_communication(ranks, saved, family, backend):
    folder, _ = saved(family)
    for found in ranks(2).run(work.score_split, folder=str(folder), backend=backend):
        for plain, edited, again in found["collectives"].values():
            assert len(plain) > 2 and edited == again
            assert edited == plain


def test_without_tables_each_pass_adds_up_what_its_edits_need_of_experts(ranks, saved):
    """Once for each block with edited experts, on every rank, and nothing beyond that."""
    folder, expected = saved("gpt_oss")
    both = ranks(2).run(work.score_split, folder=str(folder), backend="hf_plan", tables=False)
    assert both[0]["collectives"] == both[1]["collectives"]
    for found in both:
        assert_same(found, expected)
        assert found["without tables"] == "full"
        for row_norm, (plain, edited, again) in found["collectives"].items():
            # Two blocks' [E, N, D] for N = 3 directions of 4 trials: that of no edit is an edit's own in every block.
            sums = [4 * 3 * 32 // 4] * 2 if row_norm == "full" else []
            assert edited == again == sums + plain


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_replicas_with_prompts_of_their_own(ranks, saved, family):
    folder, expected = saved(family)
    for found in ranks(2).run(work.score_replicated, folder=str(folder)):
        assert_same(found, expected)
