"""Models whose experts lie on several ranks say what the same models say whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tests import families
from tests.distributed import engines, output_edits_ranks
from tests.distributed import expert_parallel_ranks as work

pytestmark = pytest.mark.distributed

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v2", "qwen2_moe", "qwen3_5_moe", "minimax_m3")
_BIASED = ("deepseek_v3", "minimax_m3")
"""Families in which biases choose experts, but do not weigh them."""


def _config(family: str) -> PreTrainedConfig:
    if family == "minimax_m3":
        special = dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))
        return AutoConfig.for_model(
            "minimax_m3_vl_text", **special, vocab_size=len(families.VOCABULARY), hidden_size=32, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rotary_dim=4,
            num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40, max_position_embeddings=256,
        )  # fmt: skip
    config = families.REQUIRED["deepseek_v3"]()
    config.n_routed_experts, config.n_group, config.topk_group, config.routed_scaling_factor = 8, 4, 2, 2.5
    return config


def _save(family: str, folder: Path) -> Path:
    """The tiny model of a family; with groups of experts and biases that choose among them where it knows them."""
    if family not in _BIASED:
        return families.save(family, folder)
    model = AutoModelForCausalLM.from_config(_config(family))
    families.randomise(model)
    generator = torch.Generator().manual_seed(0)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    for bias_E in biases:
        bias_E.copy_(torch.rand(bias_E.shape, generator=generator))
    model.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("mixtral")`: the folder of a tiny model, and what it says whole, in one process."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def of_family(family: str) -> tuple[Path, dict[str, Any]]:
        if family not in known:
            folder = _save(family, tmp_path_factory.mktemp(family))
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
    assert found["restored"] and found["released"] and found["replaced"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_say_what_one_says(ranks, saved, family):
    folder, expected = saved(family)
    whole = 8 if family == "deepseek_v3" else 4
    for found in ranks(2).run(work.measure_expert_parallel, folder=str(folder), degree=2):
        assert_same(found, expected)
        assert found["degree"] == 2 and set(found["experts"]) == {whole // 2}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_fewer_prompts_than_ranks(ranks, saved, family):
    folder, _ = saved(family)
    expected = engines.measure_replicated(folder, count=1)
    for found in ranks(2).run(work.measure_expert_parallel, folder=str(folder), degree=None, count=1):
        assert_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_are_those_of_the_file(ranks, saved, family):
    assert ranks(2).run(work.weights_unlike_the_file, folder=str(saved(family)[0])) == [[], []]


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_send_tokens_to_the_same_experts(ranks, saved, family):
    for shares in ranks(2).run(work.tokens_sent_elsewhere, folder=str(saved(family)[0])):
        assert shares and max(shares) == 0


@pytest.fixture(scope="module")
def scored(saved):
    """`scored("mixtral")`: scores of several edits, one after another in the weights of the whole model."""
    known: dict[str, dict[str, Any]] = {}

    def of_family(family: str) -> dict[str, Any]:
        if family not in known:
            known[family] = output_edits_ranks.score_one_by_one(saved(family)[0])
        return known[family]

    return of_family


def assert_same_scores(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["answers"] == expected["answers"]
    for row_norm, kls in expected["kl"].items():
        for kl, other in zip(kls, found["kl"][row_norm], strict=True):
            assert abs(other - kl) <= 1e-6 + 1e-4 * kl, row_norm
        assert sum(kl > 1e-3 for kl in kls) >= 2, "edits that do nothing show nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_trials_of_one_pass_have_their_own_edits(ranks, saved, scored, family):
    for found in ranks(2).run(work.score_together, folder=str(saved(family)[0]), degree=2):
        assert_same_scores(found, scored(family))


def test_trials_of_one_pass_without_tables(ranks, saved, scored):
    both = ranks(2).run(work.score_together, folder=str(saved("qwen3_moe")[0]), degree=2, tables=False)
    assert both[0]["collectives"] == both[1]["collectives"]
    for found in both:
        assert_same_scores(found, scored("qwen3_moe"))
        assert found["without tables"] == "full"


def test_capture(ranks, saved):
    folder, expected = saved("mixtral")
    for means in ranks(2).run(work.captured, folder=str(folder)):
        error_L = (means - expected["means"]).norm(dim=-1) / expected["means"].norm(dim=-1)
        assert error_L.max() < 1e-5


def test_answers_of_unlike_lengths_end_together(ranks, saved):
    folder, _ = saved("qwen3_moe")
    expected = work.answers_of_unlike_lengths_whole(folder)
    assert len({len(answer) for answer in expected}) > 1, "answers of one length do not show waiting"
    assert ranks(2).run(work.answers_of_unlike_lengths, folder=str(folder)) == [expected, expected]


def test_a_rank_whose_answers_are_decided_waits_for_the_others(ranks, saved):
    for lengths in ranks(2).run(work.answers_decided_unequally, folder=str(saved("mixtral")[0])):
        assert lengths == [4, 6, 4, 6, 4, 6, 4]


def test_ranks_measure_one_batch_size(ranks, saved):
    found = ranks(2).run(work.batch_sizes, folder=str(saved("mixtral")[0]))
    assert found[0] == found[1] and set(found[0]) == {"capture", "kl", "generate"}


def test_no_rank_tries_more_rows_than_fit_on_another(ranks, saved):
    assert ranks(2).run(work.most_rows_tried, folder=str(saved("mixtral")[0])) == [2, 2]


@pytest.mark.parametrize(
    ("family", "phase", "degree", "part"),
    [
        ("llama", "evaluate", None, "has no preset for a llama model"),
        ("gpt_oss", "capture", None, "has no preset for a gpt_oss model"),
        ("mixtral", "evaluate", 3, "evaluate.degree=3 does not divide the world size 2"),
        ("mixtral", "evaluate", 4, "evaluate.degree=4 does not divide the world size 2"),
    ],
)
def test_what_cannot_be_served_is_refused_on_every_rank(ranks, tmp_path, family, phase, degree, part):
    folder = families.save(family, tmp_path)
    found = ranks(2).run(work.refusal, folder=str(folder), degree=degree, phase=phase)
    assert found[0] == found[1] and part in found[0] and "\n" not in found[0]
    assert "world size" in part or found[0].endswith(f"set {phase}=tensor_parallel")


def test_experts_that_the_ranks_do_not_divide_are_refused(ranks, tmp_path):
    config = families.REQUIRED["mixtral"]()
    config.num_local_experts = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    found = ranks(2).run(work.refusal, folder=str(tmp_path))
    assert found[0] == found[1] and "\n" not in found[0]
    assert "evaluate.degree=2 does not divide the 3 experts of model.layers.0.mlp.experts" in found[0]
    assert found[0].endswith("choose a divisor of 3, or set evaluate=tensor_parallel")


def test_a_damaged_file_is_told_on_every_rank(ranks, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = families.save("mixtral", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and ".3.w2." in name)  # an expert of the second rank
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = ranks(2).run(work.refusal, folder=str(folder))
    assert found[0] == found[1] and "model.layers.1.mlp.experts.down_proj" in found[0]


@pytest.mark.parametrize("mistake", ["lost", "turned", "swapped between ranks"])
def test_tokens_that_go_astray_are_noticed(ranks, saved, mistake):
    for message in ranks(2).run(work.refusal_of, folder=str(saved("mixtral")[0]), mistake=mistake):
        assert "gives other logits than the unsplit model" in message
        assert message.endswith("set evaluate=tensor_parallel")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of a model most of whose 690 MB are experts, and its bytes."""
    config = families.REQUIRED["mixtral"](layers=4, width=1024)
    config.intermediate_size, config.vocab_size, config.num_local_experts = 1536, 8_000, 8
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="150MB")
    families.tokenizer().save_pretrained(folder)
    return folder, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.slow
def test_loading_takes_a_ranks_share_and_little_more(ranks, saved, large):
    folder, total = large
    tiny = str(saved("mixtral")[0])
    for used in ranks(2).run(work.memory_of_loading, folder=str(folder), tiny=tiny):
        assert used["held"] <= 0.65 * total, "half of the experts, and all that is not experts"
        assert used["peak"] <= used["held"] + used["largest"] + 48 * 2**20 < total, used
        assert used["left"] < 32 * 2**20, used


# Four ranks come last: ranks of another number are started anew.
@pytest.mark.parametrize("count", [7, 1])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_two_replicas_of_two_ranks_say_what_one_rank_says(ranks, saved, family, count):
    folder, expected = saved(family)
    if count != len(engines.LENGTHS):
        expected = engines.measure_replicated(folder, count)
    for found in ranks(4).run(work.measure_expert_parallel, folder=str(folder), degree=2, count=count):
        assert_same(found, expected)
        assert found["degree"] == 2


def test_four_ranks_hold_an_expert_each(ranks, saved):
    folder, expected = saved("mixtral")
    for found in ranks(4).run(work.measure_expert_parallel, folder=str(folder), degree=4):
        assert_same(found, expected)
        assert set(found["experts"]) == {1}


def test_one_rank_holds_all_experts(ranks, saved):
    folder, expected = saved("qwen3_moe")
    [found] = ranks(1).run(work.measure_expert_parallel, folder=str(folder), degree=None)
    assert_same(found, expected)


def test_trials_of_one_pass_on_one_rank_and_on_replicas(ranks, saved, scored):
    folder = str(saved("mixtral")[0])
    for size, degree in ((4, 2), (1, None)):
        for found in ranks(size).run(work.score_together, folder=folder, degree=degree):
            assert_same_scores(found, scored("mixtral"))
