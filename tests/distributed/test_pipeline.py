"""Models whose blocks lie on several real ranks say what the same models say whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import families
from tests.distributed import engines, output_edits_ranks
from tests.distributed import pipeline_ranks as work
from tests.distributed.ranks import RankFailed
from tests.distributed.test_output_edits import assert_same as assert_same_scores

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


def assert_same(found: dict[str, Any], expected: dict[str, Any], alike: bool, least_kl: float = 1e-3) -> None:
    """``alike``: batches are those of the whole model, so that means are, to the last bit."""
    if alike:
        assert torch.equal(found["means"], expected["means"])
    torch.testing.assert_close(found["means"], expected["means"], rtol=1e-5, atol=1e-6)
    assert found["answers"] == expected["answers"]
    assert found["kl"].keys() == expected["kl"].keys()
    for name, kl in expected["kl"].items():
        assert abs(found["kl"][name] - kl) <= 1e-6 + 1e-4 * kl, name
        assert name == "original" or kl > least_kl, "an edit that does nothing shows nothing"
    assert found["restored"] and found["released"]


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_two_stages_say_what_one_process_says(ranks, saved, microbatches):
    folder, expected = saved("llama")
    for found in ranks(2).run(work.measured, folder=folder, microbatches=microbatches):
        assert_same(found, expected, alike=microbatches == 1)


SERVED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox", "opt", "mixtral",
    "qwen3_moe", "gpt_oss", "deepseek_v3",
    "gemma3_vl", "qwen2_vl", "llava",
)  # fmt: skip


@pytest.mark.parametrize("family", SERVED)
def test_families(ranks, saved, family):
    folder, expected = saved(family, 3)
    for found in ranks(2).run(work.measured, folder=folder, microbatches=1):
        assert_same(found, expected, alike=True)


OTHERS = (
    "falcon", "falcon_new", "bloom", "mpt", "gptj", "gpt_neo", "codegen", "gpt_bigcode", "gemma", "gemma4_moe",
    "opt_projected", "opt_post_norm", "gpt_neox_serial", "phi", "phimoe", "stablelm", "cohere", "cohere2",
    "granite", "granitemoe", "glm4_moe", "starcoder2", "olmoe", "smollm3", "exaone4", "nemotron", "apertus",
    "ernie4_5_moe", "hunyuan_moe", "deepseek_v2", "minimax_m2", "dots1", "afmoe", "persimmon", "vaultgemma",
)  # fmt: skip


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.thorough
def test_trials_of_other_families_share_a_pass(ranks, saved, family):
    folder, _ = saved(family, 3)
    expected = output_edits_ranks.score_one_by_one(Path(folder))
    for found in ranks(2).run(work.scores_of_trials, folder=folder, microbatches=2):
        assert_same_scores(found, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(ranks, saved, family):
    folder, expected = saved(family, 3)
    for found in ranks(2).run(work.measured, folder=folder, microbatches=2):
        assert_same(found, expected, alike=False, least_kl=1e-4)  # Cohere's logits are small


@pytest.mark.parametrize(("count", "microbatches"), [(7, None), (1, 4), (2, 3)])
def test_batches_of_fewer_rows_than_microbatches(ranks, saved, count, microbatches):
    folder, _ = saved("llama")
    expected = engines.measure_replicated(Path(folder), count)
    for found in ranks(2).run(work.measured, folder=folder, count=count, microbatches=microbatches, batch_size=7):
        assert_same(found, expected, alike=False)


def test_three_stages(ranks, saved):
    folder, expected = saved("gemma3", 5)
    held = ranks(3).run(work.measured, folder=folder, microbatches=1)
    for found in held:
        assert_same(found, expected, alike=True)
    assert sum(found["bytes"] for found in held) <= 1.01 * expected["bytes"]


@pytest.mark.parametrize(("count", "microbatches"), [(7, 1), (7, 2), (1, 2)])
def test_two_replicas_of_two_stages(ranks, saved, count, microbatches):
    folder, _ = saved("llama")
    expected = engines.measure_replicated(Path(folder), count)
    for found in ranks(4).run(work.measured, folder=folder, count=count, degree=2, microbatches=microbatches):
        assert_same(found, expected, alike=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_trials_share_a_pass(ranks, saved, family):
    folder, _ = saved(family, 3)
    expected = output_edits_ranks.score_one_by_one(Path(folder))
    for found in ranks(2).run(work.scores_of_trials, folder=folder, microbatches=2):
        assert_same_scores(found, expected)


def test_trials_share_a_pass_without_tables_of_experts(ranks, saved):
    folder, _ = saved("gpt_oss", 3)
    expected = output_edits_ranks.score_one_by_one(Path(folder))
    for found in ranks(2).run(work.scores_of_trials, folder=folder, tables=False):
        assert_same_scores(found, expected)


SPLIT = ("llama", "gemma3", "mixtral", "gpt_oss")
SPLIT_TOO = (
    "mistral", "qwen2", "qwen3", "gemma2", "gpt_neox", "phi3", "olmo2", "qwen3_moe", "deepseek_v3",
    "gemma3_vl", "qwen2_vl", "llava",
)  # fmt: skip


def bytes_of_vision(folder: Path) -> int:
    """Of what comes before the decoder where there is a picture: every rank has it whole."""
    tensors = load_file(folder / "model.safetensors")
    return sum(
        tensor.nbytes for name, tensor in tensors.items() if "visi" in name or "visual" in name or "multi_modal" in name
    )


@pytest.mark.parametrize("family", [*SPLIT, *(pytest.param(each, marks=pytest.mark.thorough) for each in SPLIT_TOO)])
def test_stages_that_are_split(ranks, saved, family):
    folder, expected = saved(family, 3)
    found = ranks(4).run(work.measured, folder=folder, placement="tensor_pipeline")
    for each in found:
        assert_same(each, expected, alike=False)
    held = sum(each["bytes"] for each in found) - (len(found) - 1) * bytes_of_vision(Path(folder))
    assert held <= 1.25 * expected["bytes"], "latent attention is not split in all parts"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_trials_share_a_pass_of_split_stages(ranks, saved, family):
    folder, _ = saved(family, 3)
    expected = output_edits_ranks.score_one_by_one(Path(folder))
    for found in ranks(4).run(work.scores_of_trials, folder=folder, placement="tensor_pipeline"):
        assert_same_scores(found, expected)


@pytest.mark.parametrize(
    ("count", "placement", "rank"),
    [(3, "pipeline", 0), (3, "pipeline", 1), (4, "tensor_pipeline", 0), (4, "tensor_pipeline", 3)],
)
def test_memory_that_runs_out_on_one_rank_is_known_to_all(ranks, saved, count, placement, rank):
    folder, _ = saved("llama", 3)
    found = ranks(count).run(work.starved_scores, folder=folder, rank=rank, placement=placement)
    assert all(each["sizes"] == found[0]["sizes"] for each in found)
    assert max(found[0]["sizes"].values()) < 7
    for each in found:
        torch.testing.assert_close(each["found"]["means"], each["expected"]["means"], rtol=1e-5, atol=1e-5)
        assert each["found"]["kl"] == pytest.approx(each["expected"]["kl"], rel=1e-4, abs=1e-6)
        assert each["found"]["answers"] == each["expected"]["answers"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_no_stage_waits_for_one_that_was_killed(ranks, saved, tmp_path, rank):
    folder, _ = saved("llama", 3)
    with pytest.raises(RankFailed, match=f"rank {rank}: the process ended with status -9"):
        ranks(3).run(work.killed, folder=folder, rank=rank, heard=str(tmp_path / "heard"), timeout=90)
    for other in {0, 1, 2} - {rank}:
        assert float((tmp_path / f"heard.{other}").read_text()) < 60


@pytest.mark.parametrize("parity_check", [False, True])
def test_loading_takes_a_stage_and_little_more(ranks, tmp_path, parity_check):
    folder = families.save("llama", tmp_path, width=1024, layers=12)
    found = ranks(2).run(work.memory_of_loading, folder=str(folder), parity_check=parity_check)
    for used in found:
        assert used["held"] > 100e6, "a smaller model could not show that memory was taken"
        assert used["peak"] < used["held"] + used["largest"] + 100e6


REFUSED = {
    "evaluate.degree=3 does not divide the world size 4": {"degree": 3},
    "evaluate.degree=4 asks for more stages than this model's 3 blocks": {"degree": 4},
    "evaluate.microbatches is 0; it has to be": {"microbatches": 0},
    "does not leave each stage 2 or more of 4 ranks": {"placement": "tensor_pipeline", "pipeline_degree": 3},
    "evaluate.tensor_degree x evaluate.pipeline_degree=6 does not divide the world size 4": {
        "placement": "tensor_pipeline", "tensor_degree": 3,
    },
    "evaluate.degree=2 is not evaluate.tensor_degree x evaluate.pipeline_degree = 2 x 2": {
        "placement": "tensor_pipeline", "tensor_degree": 2, "degree": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_degrees_that_do_not_fit_are_refused_on_every_rank(ranks, saved, said):
    folder, _ = saved("llama", 3)
    for message in ranks(4).run(work.refusal, folder=folder, **REFUSED[said]):
        assert said in message and "\n" not in message


UNSERVED = {
    ("gemma4", "pipeline"): "its blocks are given more of the stream than what the block before gave",
    ("qwen3_next", "pipeline"): "its cache has layers with a state of their own (LinearAttentionLayer)",
    ("qwen3_next", "tensor_pipeline"): "its cache has layers with a state of their own (LinearAttentionLayer)",
    ("gpt2", "tensor_pipeline"): "no parallel plan for GPT2LMHeadModel; set another evaluate.tensor_degree, or",
}


@pytest.mark.parametrize(("family", "placement"), UNSERVED)
def test_families_that_cannot_be_served_are_refused_before_weights_are_read(ranks, tmp_path, family, placement):
    folder = families.save(family, tmp_path, layers=4)
    for message in ranks(4).run(work.refusal, folder=str(folder), placement=placement):
        assert UNSERVED[family, placement] in message and "evaluate=" in message and "\n" not in message


def test_ranks_of_a_stage_are_consecutive(ranks):
    near, line = zip(*ranks(4).run(work.mesh, width=2, stages=2), strict=True)
    assert near == ([0, 1], [0, 1], [2, 3], [2, 3])
    assert line == ([0, 2], [1, 3], [0, 2], [1, 3])
    assert ranks(4).run(work.mesh, width=2, stages=1)[3] == ([2, 3], None)
    assert ranks(4).run(work.mesh, width=1, stages=2)[3] == (None, [2, 3])
