"""Models cut over real ranks by ZeRO-3 say what the same models say whole, in the memory that they promise."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from heretic_ds.errors import UserError
from heretic_ds.placements.zero3 import Zero3
from heretic_ds.placements.zero3.offload import check_offload, load_reader
from tests import families
from tests.distributed import zero3_ranks

pytestmark = pytest.mark.distributed

FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe", "qwen3_next", "gpt2", "deepseek_v3", "lfm2")
COUNTS = (7, 1)
"""Prompts: more on one rank than on the other, and fewer than ranks."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of("llama")`: the folder of a tiny model."""
    known = {}

    def of_family(family):
        if family not in known:
            known[family] = families.save(family, tmp_path_factory.mktemp(family))
        return known[family]

    return of_family


def assert_same(found, expected, tolerance=1e-5):
    for means_LD, expected_LD in zip(found["means"], expected["means"], strict=True):
        error_L = (means_LD - expected_LD).norm(dim=-1) / expected_LD.norm(dim=-1)
        assert error_L.max() < tolerance
    assert found["answers"] == expected["answers"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_say_what_one_says(ranks, folder_of, family):
    folder = folder_of(family)
    expected = zero3_ranks.capture_and_answer_whole(folder, COUNTS)
    assert len({len(answer) for answer in expected["answers"][0]}) > 1, "answers of one length do not show waiting"
    for found in ranks(2).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=COUNTS):
        assert_same(found, expected)
        assert found["held"] <= 0.51 * found["whole"] and found["degree"] == 2


def test_nothing_need_stay_gathered(ranks, folder_of):
    """Without a threshold every parameter, however small, is cut; without a prefetch each is gathered when used."""
    folder = folder_of("gemma3")
    expected = zero3_ranks.capture_and_answer_whole(folder, COUNTS)
    settings = {"param_persistence_threshold": 0, "prefetch_bucket_size": 0, "max_live_parameters": 0}
    for found in ranks(2).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=COUNTS, **settings):
        assert_same(found, expected)


def test_three_ranks_share_seven_prompts_and_cut_rows(ranks, folder_of):
    folder = folder_of("mixtral")
    assert ranks(3).run(zero3_ranks.weights_unlike_the_file, folder=str(folder)) == [[], [], []]
    expected = zero3_ranks.capture_and_answer_whole(folder, COUNTS)
    for found in ranks(3).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=COUNTS):
        assert_same(found, expected)


def test_ranks_measure_one_batch_size(ranks, folder_of):
    folder = folder_of("llama")
    expected = zero3_ranks.capture_and_answer_whole(folder, (7,))
    found = ranks(2).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=(7,), batch_size=0)
    assert found[0]["batch_sizes"] == found[1]["batch_sizes"] and set(found[0]["batch_sizes"]) == {
        "capture",
        "generate",
    }
    assert_same(found[1], expected)


def test_bfloat16_stays_bfloat16(ranks, folder_of):
    folder = folder_of("mixtral")
    expected = zero3_ranks.capture_and_answer_whole(folder, (7,), dtype="bfloat16")
    whole = zero3_ranks.saved_tensors(folder)
    for found in ranks(2).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=(7,), dtype="bfloat16"):
        assert found["whole"] == 2 * sum(tensor.numel() for tensor in whole.values())
        assert_same({"means": found["means"], "answers": None}, {**expected, "answers": None}, tolerance=0.02)


def test_a_rank_whose_answers_are_decided_waits_for_the_others(ranks, folder_of):
    for answers in ranks(2).run(zero3_ranks.answers_decided_unequally, folder=str(folder_of("llama"))):
        assert [len(answer) for answer in answers] == [4, 12, 4, 12, 4, 12, 4]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral", "qwen3_moe", "opt", "deepseek_v3"])
def test_loaded_weights_are_those_of_the_file(ranks, folder_of, family):
    assert ranks(2).run(zero3_ranks.weights_unlike_the_file, folder=str(folder_of(family))) == [[], []]


@pytest.mark.slow
def test_a_rank_reads_its_share_and_gives_all_of_it_back(ranks, folder_of, tmp_path):
    large = families.save("llama", tmp_path, width=1024, layers=6)
    tiny = str(folder_of("llama"))
    for found in ranks(2).run(
        zero3_ranks.memory_of_an_engine, timeout=280, folder=str(large), tiny=tiny, rounds=2, prefetch_bucket_size=0
    ):
        for each in found:
            assert each["held"] > 80e6, "a smaller model could not show that memory stayed"
            assert each["peak"] < each["held"] + each["largest"] + 30e6
            assert each["read"] < 1.02 * each["held"] + 2e6, "what lies around a rank's part is not read"
        assert found[0]["left"] < 16e6 and found[1]["left"] < 8e6


def test_no_function_stays_replaced(ranks, folder_of):
    for found in ranks(2).run(zero3_ranks.functions_left_replaced, folder=str(folder_of("llama"))):
        assert found == {
            "after an engine": [],
            "during the second": ["torch.nn.functional.linear"],
            "after the second": [],
        }


def test_nothing_refers_to_a_closed_engine(ranks, folder_of):
    assert ranks(2).run(zero3_ranks.modules_left_alive, folder=str(folder_of("mixtral"))) == [0, 0]


def test_what_zero3_cannot_serve_is_refused_on_every_rank(ranks, folder_of, tmp_path):
    folder = str(folder_of("llama"))
    cases = {
        "capture.degree=1 with capture=zero3 and 2 ranks": {"degree": 1},
        "capture.offload=cpu keeps weights in host memory": {"offload": "cpu"},
        "is no folder": {"offload": "nvme", "nvme_path": str(tmp_path / "missing")},
        "evaluate=zero3: zero3 serves capture only": {"phase": "evaluate"},
    }
    for part, options in cases.items():
        found = ranks(2).run(zero3_ranks.refusal, folder=folder, **options)
        assert found[0] == found[1] and part in found[0] and "\n" not in found[0]


def test_a_mistake_of_one_rank_is_told_on_every_rank(ranks, folder_of):
    found = ranks(2).run(zero3_ranks.refusal_of_one_rank, folder=str(folder_of("llama")))
    assert (found[0] == found[1] and "is no folder" in found[0]) or "asynchronous" in found[0]


def test_a_damaged_file_is_told_on_every_rank(ranks, folder_of, tmp_path):
    from safetensors.torch import save_file

    folder = families.save("llama", tmp_path)
    tensors = zero3_ranks.saved_tensors(folder)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = float("nan")  # in the part of the second rank
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = ranks(2).run(zero3_ranks.refusal, folder=str(folder))
    assert found[0] == found[1] and "model.layers.1.mlp.down_proj.weight" in found[0]
    whole = folder_of("llama")  # ranks that stopped at unlike places start alike again
    expected = zero3_ranks.capture_and_answer_whole(whole, (7,))
    for found in ranks(2).run(zero3_ranks.capture_and_answer, folder=str(whole), counts=(7,)):
        assert_same(found, expected)


def test_a_lack_of_memory_names_the_setting(ranks, folder_of):
    for said in ranks(2).run(zero3_ranks.memory_ran_out, folder=str(folder_of("llama"))):
        assert said.endswith("set generation.batch_size below 2")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # DeepSpeed compiles its asynchronous I/O at first use
@pytest.mark.thorough  # where libaio is installed, DeepSpeed compiles for minutes
def test_weights_rest_on_a_disk(ranks, tmp_path):
    """Partitions of more than a megabyte are files while they are not in use, and the files go with the engine."""
    offload = {"offload": "nvme", "nvme_path": str(tmp_path / "disk")}
    os.makedirs(offload["nvme_path"])
    try:
        check_offload(Zero3.Options(**offload), torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    load_reader(Zero3.Options(**offload))  # here, where a slow compiler is waited for
    folder = families.save("llama", tmp_path / "model", width=768)
    expected = zero3_ranks.capture_and_answer_whole(folder, COUNTS)
    for found in ranks(2).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=COUNTS, **offload):
        assert_same(found, expected)
        assert found["held"] < 0.1 * found["whole"]
    assert os.listdir(offload["nvme_path"]) == []


def test_one_process_is_a_world_too(ranks, folder_of, caplog):
    folder = folder_of("llama")
    expected = zero3_ranks.capture_and_answer_whole(folder, COUNTS)
    with caplog.at_level(logging.WARNING):
        [found] = ranks(1).run(zero3_ranks.capture_and_answer, folder=str(folder), counts=COUNTS)
    assert_same(found, expected)
