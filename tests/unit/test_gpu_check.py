"""What a machine without a GPU can say of the check that needs one: shapes, order, a tiny model's numbers, its file."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import benchmark


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    return benchmark("gpu_check")


def test_the_large_shape_is_an_8b_llama(gpu_check: ModuleType) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**gpu_check.SHAPES["8b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_parity_of_everything_comes_before_any_speed_and_the_reference_first(gpu_check: ModuleType) -> None:
    stages = gpu_check.stages(["speed", "parity", "zero3"])
    kinds = [stage.kind for stage in stages]
    assert kinds == sorted(kinds, key=["parity", "speed", "zero3"].index)
    assert stages[0] == gpu_check.Stage("parity", "replicated", "float32")
    assert {stage.placement for stage in stages if stage.kind == "speed"} == set(gpu_check.PLACEMENTS)


@pytest.mark.parametrize("at_once", [1, 3])
def test_only_parity_that_has_its_reference_runs_side_by_side(gpu_check: ModuleType, at_once: int) -> None:
    stages = gpu_check.stages(["parity", "speed", "zero3"])
    rounds = gpu_check.rounds(stages, at_once)
    assert [stage for together in rounds for stage in together] == stages and rounds[0] == stages[:1]
    assert {len(together) for together in rounds if together[0].kind != "parity"} == {1}
    assert [len(together) for together in rounds if together[0].kind == "parity"][1] == at_once
    assert gpu_check.rounds(gpu_check.stages(["zero3"]), at_once) == [gpu_check.stages(["zero3"])]


def test_numbers_of_a_tiny_model(gpu_check: ModuleType, tmp_path: Path) -> None:
    gpu_check.make_model(tmp_path, "tiny", "cpu")
    exact = gpu_check.parity(tmp_path, "replicated", "float32")
    assert exact["right"] and exact["logits_error_of_spread"] == exact["kl_error"] == 0
    assert exact["restored_bit_for_bit"] and exact["kl_of_an_edit"] > 0
    rounded = gpu_check.parity(tmp_path, "replicated", "bfloat16")
    assert rounded["right"] and 0 < rounded["logits_error_of_spread"] < 0.05


def test_what_was_found_is_kept_beside_what_is_found_later(gpu_check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "gpu.json"
    gpu_check.write(file, "tiny", {"parity replicated float32": {"right": True}})
    gpu_check.write(file, "tiny", {"speed replicated bfloat16": {"tokens_per_second": 2.0}})
    kept = json.loads(file.read_text())
    assert list(kept["measurements"]) == ["parity replicated float32", "speed replicated bfloat16"]
    assert kept["versions"]["torch"] == version("torch") and kept["machine"]["cores"] and kept["shape"] == "tiny"
    gpu_check.write(file, "1b", {"parity replicated float32": {"right": True}})
    assert list(json.loads(file.read_text())["measurements"]) == ["parity replicated float32"]


def test_a_measurement_that_dies_costs_itself_only(gpu_check: ModuleType, tmp_path: Path) -> None:
    found = gpu_check.run_apart(gpu_check.Stage("parity", "replicated", "float32"), tmp_path / "nowhere")
    assert "nowhere" in found["error"] and "\n" not in found["error"]


def test_a_measurement_that_takes_too_long_is_given_up(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "MOST_SECONDS", 10)
    script = tmp_path / "sleeps.py"
    script.write_text("import sys, time\nprint('at work', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    found = gpu_check.run_apart(gpu_check.Stage("speed", "replicated", "bfloat16"), tmp_path, str(script))
    assert found["error"] == "not done after 10 s" and 10 <= found["seconds_in_all"] < 50
    assert (tmp_path / "speed replicated bfloat16.log").read_text() == "at work\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "CUDA" in said.err
