"""Weights that ranks of one machine read together: bit for bit those that each reads alone, for a part of the bytes."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import families
from tests.distributed import sharing_ranks as work
from tests.unit.test_sharded_loading import save_transposed_experts

pytestmark = pytest.mark.distributed

FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "phi3")
"""Tied embeddings, Conv1D, experts that transformers merges while loading, routers in float32, buffers on disk."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of("llama", "bfloat16")`: the folder of a tiny model."""
    known = {}

    def of_family(family, dtype="float32"):
        if (family, dtype) not in known:
            folder = families.save(family, tmp_path_factory.mktemp(family), dtype=getattr(torch, dtype))
            known[family, dtype] = str(folder)
        return known[family, dtype]

    return of_family


def assert_same(found):
    assert found["names"] and found["unequal"] == [] and found["alike"] and found["ready"]
    assert found["parameters"][0] == found["parameters"][1], "tied parameters came apart"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_have_what_each_would_load(ranks, folder_of, family, dtype):
    for found in ranks(2).run(work.compare, folder=folder_of(family, dtype), dtype=dtype):
        assert_same(found)
        assert found["read"] < 0.55 * found["whole"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_model_that_was_read_together_is_saved_alike(ranks, folder_of, family, tmp_path):
    together, alone = ranks(2).run(work.saved, folder=folder_of(family), target=str(tmp_path))[0]
    assert together == alone and "model.safetensors" in together


def test_what_only_a_conversion_can_make_is_made_by_one_rank(ranks, tmp_path):
    save_transposed_experts(tmp_path)
    families.tokenizer().save_pretrained(tmp_path)
    for found in ranks(2).run(work.compare, folder=str(tmp_path), dtype="float32"):
        assert_same(found)
        assert found["read"] < 0.7 * found["whole"]


@pytest.mark.parametrize("machines", [("a", "b", "a"), None], ids=["on two machines", "on one"])
def test_three_ranks_share_with_those_of_their_machine(ranks, folder_of, machines):
    """Four experts do not divide by three: what is left over goes to one rank, another one each time."""
    arguments = {"folder": folder_of("mixtral"), "dtype": "float32", "machines": machines}
    parts = (1 / 2, 1, 1 / 2) if machines else (1 / 3, 1 / 3, 1 / 3)
    for part, found in zip(parts, ranks(3).run(work.compare, **arguments), strict=True):
        assert_same(found)
        assert found["read"] / found["whole"] == pytest.approx(part, abs=0.12)


@pytest.mark.parametrize(
    ("machines", "pickled", "why"),
    [
        (("a", "b"), False, "there is one rank on each machine"),
        (None, True, "weights are quantised or not safetensors"),
    ],
)
def test_where_nothing_can_be_shared_it_is_said_once(ranks, folder_of, machines, pickled, why):
    for lines in ranks(2).run(work.told, folder=folder_of("llama"), machines=machines, pickled=pickled):
        assert lines == [f"load.share=true does nothing: {why}"]


def broken_copy(source: str, folder, change):
    """A copy of the model whose tensors have been changed."""
    families.tokenizer().save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((type(folder)(source) / name).read_bytes())
    tensors = load_file(f"{source}/model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("row", [0, -1], ids=["first rank's part", "second rank's part"])
def test_a_part_that_is_not_finite_is_told_by_all(ranks, folder_of, row, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    folder = broken_copy(folder_of("llama"), tmp_path, lambda tensors: tensors[name][row].fill_(math.nan))
    said = ranks(2).run(work.refusal, folder=folder)
    assert said[0] == said[1] and name in said[0] and "NaN or infinite" in said[0]


def test_a_lacking_tensor_is_told_by_all(ranks, folder_of, tmp_path):
    name = "model.norm.weight"
    folder = broken_copy(folder_of("llama"), tmp_path, lambda tensors: tensors.pop(name))
    said = ranks(2).run(work.refusal, folder=folder)
    assert said[0] == said[1] and name in said[0]


@pytest.mark.parametrize("where", [0, 1])
def test_what_one_rank_cannot_read_is_told_by_all(ranks, folder_of, where):
    said = ranks(2).run(work.refusal, folder=folder_of("llama"), where=where)
    assert said[0] == said[1] and "ends too early" in said[0]


def test_ranks_fall_back_to_one_dtype(ranks, folder_of, tmp_path):
    """One rank alone reads the number that float16 cannot hold."""
    name = "model.layers.1.mlp.down_proj.weight"
    folder = broken_copy(folder_of("llama"), tmp_path, lambda tensors: tensors[name][0, 0].fill_(1e6))
    assert ranks(2).run(work.dtype_reached, folder=folder) == ["torch.float32"] * 2
