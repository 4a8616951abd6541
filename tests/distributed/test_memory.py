"""Memory that runs out on one rank alone, in the middle of a pass: all ranks know before any of them goes on."""

from __future__ import annotations

import pytest
import torch

from tests import families
from tests.distributed import memory_ranks as work

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that every placement serves."""
    return str(families.save("mixtral", tmp_path_factory.mktemp("mixtral")))


@pytest.mark.parametrize("batch_size", [7, 0], ids=["in a pass", "in measuring"])
@pytest.mark.parametrize("placement", ["tensor_parallel", "expert_parallel", "fsdp", "pipeline"])
def test_both_ranks_go_on_with_as_many_rows(ranks, folder, placement, batch_size):
    first, second = ranks(2).run(work.starved_scores, folder=folder, placement=placement, batch_size=batch_size)
    assert first["sizes"] == second["sizes"]
    assert max(first["sizes"].values()) < 7 and min(first["sizes"].values()) >= 1
    for rank in (first, second):
        found, expected = rank["found"], rank["expected"]
        torch.testing.assert_close(found["means"], expected["means"], rtol=1e-5, atol=1e-5)
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-6)
        assert found["answers"] == expected["answers"]


def test_replicas_go_on_measuring_alike_where_one_has_less_memory(ranks, folder):
    """Each has prompts of its own, and passes those again that did not fit, while the other has gone on."""
    first, second = ranks(2).run(work.measured_by_its_passes, folder=folder)
    assert first["size"] == second["size"] and 1 <= first["size"] <= 3
    for rank in (first, second):
        torch.testing.assert_close(rank["means"], rank["expected"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [7, 0], ids=["in a pass", "in measuring"])
def test_both_ranks_end_with_one_sentence_where_weights_are_gathered(ranks, folder, batch_size):
    said = [each["said"] for each in ranks(2).run(
        work.starved_scores, folder=folder, placement="zero3", batch_size=batch_size
    )]  # fmt: skip
    assert said[0] == said[1] and "from which zero3 cannot recover; set generation.batch_size below" in said[0]


@pytest.mark.parametrize("placement", ["expert_parallel", "fsdp"])
def test_memory_that_runs_out_after_the_last_collective_is_no_answer(ranks, folder, placement):
    """Ranks in lockstep ask each other who goes on: a failure must not be taken for somebody who does."""
    assert ranks(2).run(work.answers_of_a_starved_head, folder=folder, placement=placement) == [[True, 2]] * 2


@pytest.mark.parametrize("placement", ["tensor_parallel", "expert_parallel", "fsdp", "pipeline"])
def test_a_row_that_never_fits_on_one_rank_is_told_by_both(ranks, folder, placement):
    for said in ranks(2).run(work.never_fits, folder=folder, placement=placement):
        assert said.startswith("a single prompt does not fit in memory while capture runs")
