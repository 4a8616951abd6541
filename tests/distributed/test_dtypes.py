"""Sharded placements fall back to a wider dtype where the first one does not hold a model, all ranks together."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import families
from tests.distributed import engines

pytestmark = pytest.mark.distributed


def scaled(folder: Path, name: str, factor: float) -> Path:
    """A saved llama with one tensor made larger."""
    families.save("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("phase", "placement"),
    [("capture", "zero3"), ("evaluate", "tensor_parallel"), ("evaluate", "fsdp"), ("evaluate", "pipeline")],
)
@pytest.mark.parametrize(
    ("name", "factor", "reached"),
    [
        ("model.norm.weight", 1.0, "torch.float16"),
        ("model.embed_tokens.weight", 1e6, "torch.float32"),  # weights that float16 cannot hold
        ("model.norm.weight", 2e4, "torch.float32"),  # weights that it holds, logits that it does not
    ],
)
def test_the_first_dtype_that_works_is_taken(ranks, tmp_path, phase, placement, name, factor, reached):
    folder = scaled(tmp_path / "model", name, factor)
    found = ranks(2).run(engines.dtype_reached, folder=str(folder), phase=phase, placement=placement)
    assert found == [reached] * 2


@pytest.mark.parametrize("lacks", [0, 1])
@pytest.mark.parametrize(
    ("phase", "placement"),
    [("capture", "zero3"), ("evaluate", "tensor_parallel"), ("evaluate", "fsdp"), ("evaluate", "pipeline")],
)
def test_what_fails_on_one_rank_alone_is_tried_otherwise_on_all(ranks, tmp_path, phase, placement, lacks):
    """An operation that the first dtype lacks stops one rank before a collective that the others wait in."""
    folder = families.save("llama", tmp_path)
    found = ranks(2).run(
        engines.dtype_reached_by_all, folder=str(folder), phase=phase, placement=placement, lacks=lacks, timeout=60
    )
    assert found == ["torch.float32"] * 2
