"""vLLM gives the answers and divergences of the model in this process, edited in outputs and in weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heretic_ds.runner.engine import MOST_EDITS
from heretic_ds.world import World
from tests.distributed.ranks import Ranks
from tests.distributed.vllm_ranks import everything, expected, save

LONG = ("qwen3", "gemma3", "qwen3_moe", "qwen2_moe", "gemma2", "gpt2")
MOE = frozenset({"mixtral", "qwen3_moe", "qwen2_moe"})
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def check(found: dict[str, Any], wanted: dict[str, Any], family: str, ranks: int = 1) -> None:
    """Answers are equal, divergences within the rounding of float32, and weights come back bit for bit."""
    assert found["measured"].keys() == wanted["measured"].keys()
    for name, theirs in wanted["measured"].items():
        ours = found["measured"][name]
        assert ours["answers"] == theirs["answers"], name
        for one, other in zip(ours["kl"], theirs["kl"], strict=True):
            assert one == pytest.approx(other, abs=1e-6, rel=1e-4), name
    assert found["logits"] == pytest.approx(wanted["logits"], abs=1e-4)  # from logits of tens
    assert found["edited"] == [True] * ranks and found["restored"] == [True] * ranks
    assert found["most_edits"] == (1 if family in MOE else MOST_EDITS)  # the last form is `full`
    ended = [len(answer) for of_edit in found["measured"]["stopped early"]["answers"] for answer in of_edit]
    assert 4 in ended and max(ended) > 4


@pytest.mark.parametrize(
    "family", ["llama", "mixtral", *(pytest.param(each, marks=pytest.mark.thorough) for each in LONG)]
)
def test_it_agrees_with_the_model_in_this_process(family: str, vllm_python: str, tmp_path: Path) -> None:
    folder = str(save(family, tmp_path))
    check(everything(World(), folder, vllm_python), expected(folder), family)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_it_removes_several_directions_alike(family: str, vllm_python: str, tmp_path: Path) -> None:
    folder = str(save(family, tmp_path / family))
    check(everything(World(), folder, vllm_python, rank=3), expected(folder, rank=3), family)


@pytest.mark.parametrize(
    "family", [pytest.param("llama", marks=pytest.mark.thorough), pytest.param("mixtral", marks=pytest.mark.thorough)]
)
def test_one_process_may_split_the_model(family: str, vllm_python: str, tmp_path: Path) -> None:
    folder = str(save(family, tmp_path))
    check(everything(World(), folder, vllm_python, tensor_parallel=2), expected(folder), family, ranks=2)


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "degree"), [("qwen3_moe", 2), pytest.param("llama", 1, marks=pytest.mark.thorough)])
def test_ranks_share_a_model_or_prompts(
    family: str, degree: int, vllm_python: str, ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """Two ranks with one model over two of vLLM's, or with a model each."""
    folder = str(save(family, tmp_path))
    both = ranks(2).run(everything, timeout=800, folder=folder, python=vllm_python, degree=degree)
    assert both[0] == both[1] and both[0]["degree"] == degree
    check(both[0], expected(folder), family, ranks=2)
