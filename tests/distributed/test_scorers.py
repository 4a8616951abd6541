"""Scores under several ranks: those of one rank, alike on all, of answers that rank 0 alone has scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from heretic_ds.world import World
from tests import families
from tests.distributed import scorers_ranks as work
from tests.judges import save_judge

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("placement", "degree"), [("replicated", None), ("tensor_parallel", 2)])
def test_two_ranks_give_the_scores_of_one(ranks, folder: Path, tmp_path: Path, placement: str, degree: int | None):
    judge = str(save_judge(tmp_path / "judge"))
    alone = work.scored(World(), str(folder), judge, "replicated")
    found = ranks(2).run(work.scored, folder=str(folder), judge=judge, placement=placement, degree=degree)
    assert found[0]["scores"] == found[1]["scores"]
    for each, expected in zip(found[0]["scores"], alone["scores"], strict=True):
        assert each == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for each, expected in zip(found[0]["values"], alone["values"], strict=True):
        assert each == pytest.approx(expected, rel=1e-4)
    assert [each["loaded"] for each in found] == [True, False]
    assert (found[0]["asked"], found[1]["asked"]) == (3, 0)
    assert alone["scores"][1]["kl_tokens"] > 1e-4


def test_a_scorer_that_fails_ends_all_ranks(ranks, folder: Path) -> None:
    assert ranks(2).run(work.broken, folder=str(folder)) == [
        "ValueError: no such letter", "RankFailed: ValueError: no such letter",
    ]  # fmt: skip
