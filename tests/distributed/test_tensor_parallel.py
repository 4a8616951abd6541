"""Models split over real ranks say what the same models say whole: every family, both backends, every form of edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heretic_ds.placements.tensor_parallel.planned import sizes_held
from heretic_ds.world import World
from tests import families
from tests.distributed import engines
from tests.planned_models import facts_for

pytestmark = pytest.mark.distributed

AUTOTP = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "opt",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
)
HF_PLAN = (
    "llama", "qwen3", "gemma3", "phi3", "olmo2", "mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "qwen3_5", "lfm2",
    "gemma3_vl", "qwen2_vl", "llava",
)  # fmt: skip
UNSERVED = {"gpt2": "auto", "phi3": "autotp", "olmo2": "autotp", "opt": "hf_plan", "qwen3_next": "autotp"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved("llama")`: the folder of a tiny model, and what it says whole, in one process."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of_family(family: str) -> tuple[Path, dict[str, Any]]:
        if family not in known:
            folder = families.save(family, tmp_path_factory.mktemp(family))
            known[family] = folder, engines.measure_replicated(folder)
        return known[family]

    return of_family


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    error_L = (found["means"] - expected["means"]).norm(dim=-1) / expected["means"].norm(dim=-1)
    assert error_L.max() < 1e-5
    assert found["answers"] == expected["answers"]
    assert found["kl"].keys() == expected["kl"].keys()
    for name, kl in expected["kl"].items():
        assert abs(found["kl"][name] - kl) <= 1e-6 + 1e-4 * kl, name
        assert name == "original" or kl > 1e-3, "an edit that does nothing shows nothing"
    assert found["restored"] and found["released"]


@pytest.mark.parametrize(
    ("family", "backend"), [(family, "autotp") for family in AUTOTP] + [(family, "hf_plan") for family in HF_PLAN]
)
def test_two_ranks_say_what_one_says(ranks, saved, family, backend):
    folder, expected = saved(family)
    told = ranks(2).run(engines.measure_tensor_parallel, folder=str(folder), degree=2, backend=backend)
    for found in told:
        assert_same(found, expected)
    facts = facts_for(family, AutoConfig.from_pretrained(folder), torch.float32)
    planned = sizes_held(facts, backend, 2, "evaluate.degree")
    assert sum(planned.values()) == max(found["bytes"] for found in told), "the planner counts otherwise"


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_passes_over_prompts_start_late_on_every_rank(ranks, tmp_path, family, count):
    folder = str(families.save(family, tmp_path, layers=4))
    expected = engines.measure_late_starts(World(), folder, degree=1, reuse=False)
    assert expected["starts"] == [] and min(expected["kl"][:3]) > 1e-4
    for found in ranks(count).run(engines.measure_late_starts, folder=folder, degree=2):
        assert found["starts"] == [((1, 2, 3), 5)] * 2
        assert found["answers"] == expected["answers"]
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("backend", ["autotp", "hf_plan"])
def test_each_rank_holds_its_share_of_the_experts(ranks, saved, family, backend):
    folder, expected = saved(family)
    for found in ranks(2).run(engines.measure_tensor_parallel, folder=str(folder), degree=2, backend=backend):
        assert found["bytes"] <= 1.15 * expected["bytes"] / 2


@pytest.mark.parametrize("family", UNSERVED)
def test_what_a_backend_cannot_serve_is_refused_on_every_rank(ranks, saved, family):
    folder = families.save(family, saved("llama")[0].parent / f"refused_{family}")
    for message in ranks(2).run(engines.refusal, folder=str(folder), degree=2, backend=UNSERVED[family]):
        assert "evaluate=replicated" in message and "\n" not in message


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("backend", ["autotp", "hf_plan"])
def test_sixteen_bits_pass_the_parity_check(ranks, saved, family, backend):
    folder, _ = saved(family)
    arguments = {"folder": str(folder), "degree": 2, "backend": backend, "dtype": "bfloat16"}
    assert ranks(2).run(engines.refusal, **arguments) == ["accepted"] * 2


def test_one_rank_is_a_replica_of_its_own(saved):
    folder, expected = saved("mixtral")
    assert_same(engines.measure_tensor_parallel(World(), str(folder), degree=1), expected)


def test_a_backend_that_gives_another_model_is_refused(ranks, saved):
    for message in ranks(2).run(engines.refusal_of_a_wrong_sum, folder=str(saved("llama")[0])):
        assert "gives other logits than the unsplit model" in message


LARGE = {
    "llama": {"intermediate_size": 4096, "vocab_size": 24_000},
    "mixtral": {"intermediate_size": 1536, "vocab_size": 8_000, "num_local_experts": 8},
}
"""Fields that make a model of some 400 MB out of a tiny one of two layers."""


@pytest.fixture(scope="module", params=LARGE)
def large(request, tmp_path_factory):
    """The folder of a model large enough for a whole one in memory to be seen, and its bytes."""
    config = families.REQUIRED[request.param](layers=4, width=1024)
    for field, value in LARGE[request.param].items():
        setattr(config, field, value)
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="150MB")
    families.tokenizer().save_pretrained(folder)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert total > 350 * 2**20
    return folder, total


@pytest.mark.parametrize("backend", ["autotp", "hf_plan"])
def test_loading_takes_a_ranks_share_and_little_more(ranks, large, backend):
    folder, total = large
    for used in ranks(2).run(engines.memory_of_loading, folder=str(folder), backend=backend, parity_check=False):
        assert used["held"] <= 1.02 * total / 2
        # One more part, as read, and the reader's buffer: far from the other half of the model.
        assert used["peak"] <= used["held"] + used["largest"] + 64 * 2**20 < total, used


def test_the_parity_check_takes_one_block_more(ranks, large):
    folder, total = large
    arguments = {"folder": str(folder), "backend": "hf_plan", "parity_check": True}
    for used in ranks(2).run(engines.memory_of_loading, **arguments):
        assert used["peak"] <= used["held"] + used["largest"] + total / 4 + 64 * 2**20, used


# Four ranks come last: ranks of another number are started anew.
@pytest.mark.parametrize("count", [7, 1])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe"])
def test_two_replicas_of_two_ranks_say_what_one_rank_says(ranks, saved, family, count):
    folder, expected = saved(family)
    if count != len(engines.LENGTHS):
        expected = engines.measure_replicated(folder, count)
    for found in ranks(4).run(engines.measure_tensor_parallel, folder=str(folder), degree=2, count=count):
        assert_same(found, expected)


def test_heads_that_the_degree_does_not_divide_are_refused(ranks, saved):
    for message in ranks(4).run(engines.refusal, folder=str(saved("llama")[0]), degree=4):
        assert "evaluate.degree=4 does not divide the 2 num_key_value_heads" in message


def test_a_plan_that_gathers_its_heads_takes_any_degree(ranks, saved):
    folder, expected = saved("phi3")
    for found in ranks(4).run(engines.measure_tensor_parallel, folder=str(folder), degree=4, backend="hf_plan"):
        assert_same(found, expected)
