"""FP8 and MXFP4 checkpoints laid out over ranks, each of which reads its part: the scores of one rank with the
checkpoint that transformers dequantises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heretic_ds.world import World
from tests import packed
from tests.distributed import files_ranks
from tests.distributed import packed_ranks as work

pytestmark = pytest.mark.distributed

DEFAULT = [("qwen3", "tensor_parallel", {}), ("qwen3_moe", "expert_parallel", {}), ("gpt_oss", "fsdp", {})]
OTHERS = [
    ("gpt_oss", "tensor_parallel", {}),
    ("qwen3_moe", "tensor_parallel", {}),
    ("llama", "fsdp", {}),
    ("gpt_oss", "pipeline", {}),
    ("qwen3_moe", "pipeline", {}),
    ("qwen3", "zero3", {"phase": "capture"}),
    ("gpt_oss", "zero3", {"phase": "capture"}),
    ("qwen3_moe", "replicated", {}),
    ("gpt_oss", "replicated", {}),
    ("llama", "tensor_pipeline", {"tensor_degree": 2, "pipeline_degree": 2}),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("llama")`: the folders of a tiny packed model, and of what transformers makes of it."""
    known: dict[str, tuple[Path, Path]] = {}

    def of_family(family: str) -> tuple[Path, Path]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            there = packed.save(family, folder / "packed")
            known[family] = there, packed.save_dequantised(there, folder / "plain", torch.float32)
        return known[family]

    return of_family


@pytest.mark.parametrize(
    ("family", "placement", "options"),
    [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.thorough) for case in OTHERS)],
)
def test_ranks_say_what_one_says_of_the_dequantised(ranks, saved, family, placement, options):
    """Within rounding, and to the bit what they say of the dequantised checkpoint themselves."""
    there, plain = saved(family)
    size = 4 if placement == "tensor_pipeline" else 2
    phase = options.get("phase", "evaluate")
    one = work.measure(World(), str(plain), "replicated", phase)
    alone = work.measure(World(), str(there), "replicated", phase)["codes"]
    arguments = {"placement": placement, **options}
    both = [ranks(size).run(work.measure, folder=str(folder), **arguments) for folder in (there, plain)]
    for found, same in zip(*both, strict=True):
        assert torch.equal(found["means"], same["means"]) and found["answers"] == same["answers"] == one["answers"]
        error_L = (found["means"] - one["means"]).norm(dim=-1) / one["means"].norm(dim=-1)
        assert error_L.max() < 1e-5
        assert found.get("kl") == same.get("kl") and found.get("edited") == same.get("edited") == one.get("edited")
        assert phase == "capture" or (one["kl"] > 1e-3 and abs(found["kl"] - one["kl"]) <= 1e-6 + 1e-4 * one["kl"])
        checked = placement not in ("fsdp", "zero3", "replicated")  # against the unsplit model, which is read once more
        assert 0 < found["codes"] < (0.7 + checked) * alone and same["codes"] == one["codes"] == 0


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.thorough)])
def test_ranks_write_what_one_writes_of_the_dequantised(ranks, saved, tmp_path, family):
    there, plain = saved(family)
    arguments = {"source": str(there), "target": str(tmp_path / "two"), "dtype": "float32"}
    ranks(2).run(files_ranks.export, **arguments)
    files_ranks.export(World(), str(plain), str(tmp_path / "one"))
    two, one = files_ranks.digests(tmp_path / "two"), files_ranks.digests(tmp_path / "one")
    assert two["model.safetensors"] == one["model.safetensors"] and two.keys() == one.keys()
