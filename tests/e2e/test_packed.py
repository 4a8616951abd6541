"""A search over a packed checkpoint on two ranks, and its export: those of one rank on the dequantised checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import packed
from tests.conftest import ROOT
from tests.e2e.conftest import Heretic, Material, read_results
from tests.unit.test_streaming import tensors_of

pytestmark = [pytest.mark.thorough, pytest.mark.distributed]


@pytest.mark.parametrize(
    ("family", "capture", "evaluate"), [("qwen3_moe", "zero3", "tensor_parallel"), ("gpt_oss", "fsdp", "fsdp")]
)
def test_two_ranks_search_and_export_as_one(
    material: Material, heretic: Heretic, tmp_path: Path, family: str, capture: str, evaluate: str
) -> None:
    there = packed.save(family, tmp_path / "packed")
    plain = packed.save_dequantised(there, tmp_path / "plain", torch.float32)
    more = ["search.trials=2", "search.startup_trials=1", "model.dtype=float32", "run.interactive=false"]
    one = heretic(*material.words(plain, *more, "run.dir=one", "capture=replicated", "evaluate=replicated"))
    assert one.status == 0, one.err
    words = material.words(there, *more, "run.dir=two", f"capture={capture}", f"evaluate={evaluate}")
    done = subprocess.run(
        [sys.executable, "-m", "heretic_ds.launching", "-n", "2", "--", *words], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [read_results(tmp_path / name)["trials"] for name in ("one", "two")]
    assert len(trials[0]) == 2
    for first, second in zip(*trials, strict=True):
        assert _alike(first["scores"], second["scores"]), (first, second)
    written = [tensors_of(tmp_path / name / "model") for name in ("one", "two")]
    assert written[0].keys() == written[1].keys() == tensors_of(plain).keys()
    assert all(torch.allclose(tensor, written[1][name], rtol=1e-4, atol=1e-5) for name, tensor in written[0].items())
    model = tmp_path / "two" / "model"
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert json.loads((model / "heretic_ds.json").read_text())["dequantized_from"] == packed.PACKED[family]
    assert "its weights were dequantised before the edit" in (model / "README.md").read_text()


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        second[name] == pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in first.items()
    )
