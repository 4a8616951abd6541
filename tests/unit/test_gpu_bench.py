"""What a machine without a GPU can say of the benchmark that needs one: its sums, a tiny model's numbers, its files."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from heretic_ds.runner import graphs
from tests.conftest import benchmark
from tests.recorded_graphs import Recorder

RATES = {"bytes_per_second": 4e12, "operations_per_second": 8e14}


@pytest.fixture(scope="module")
def gpu_bench() -> ModuleType:
    return benchmark("gpu_bench")


def test_a_step_moves_all_weights_but_the_embedding_and_every_rows_keys_and_values(gpu_bench: ModuleType) -> None:
    shape = gpu_bench.SHAPES["8b"]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    one, many = (gpu_bench.limit(shape, rows, 100, RATES) for rows in (1, 65))
    cache = 2 * 100 * 32 * 2 * 8 * 128  # bytes for one row's keys and values
    assert one["bytes"] == 2 * matrices + 2 * 4096 + cache
    assert many["bytes"] - one["bytes"] == 64 * (2 * 4096 + cache)
    assert one["operations"] == pytest.approx(2 * matrices, rel=0.01) and many["operations"] == 65 * one["operations"]
    assert one["milliseconds"] == pytest.approx(1e3 * one["bytes"] / 4e12)
    bound = gpu_bench.limit(shape, 4000, 100, RATES)
    assert bound["milliseconds"] == pytest.approx(1e3 * bound["operations"] / 8e14)


def test_rates_come_first_and_steps_are_judged_by_them(gpu_bench: ModuleType) -> None:
    stages = gpu_bench.stages(["search", "step", "device"])
    assert stages[0].kind == "device" and len({stage.name for stage in stages}) == len(stages) == 7
    expected = gpu_bench.limit(gpu_bench.SHAPES["8b"], 8, gpu_bench.PROMPT_WORDS + 52, RATES)["milliseconds"]
    found = {
        stages[0].name: dict(RATES),
        stages[1].name: {"by_rows": {"8": {"milliseconds": 2 * expected}}},
        stages[3].name: {"trials_per_hour": 120.0, "trials_per_pass": 4, "batch_sizes": {"generate": 256}},
    }
    said = list(gpu_bench.judged(gpu_bench.SHAPES["8b"], found))
    assert "2.00 times its limit" in said[0] and "120 trials an hour, 4 a pass" in said[1]
    assert found[stages[1].name]["by_rows"]["8"]["times_limit"] == pytest.approx(2)


def test_numbers_of_a_tiny_model(gpu_bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench.gpu_check, "PROMPTS", 6)
    for name, value in (("ROWS", (1, 8)), ("STEPS", (2, 5)), ("TIMES", 1), ("NEW_TOKENS", 3)):
        monkeypatch.setattr(gpu_bench, name, value)
    monkeypatch.setattr(graphs, "makers_for", lambda device: Recorder)
    gpu_bench.gpu_check.make_model(tmp_path, "tiny", "cpu")
    rates = gpu_bench.device(tmp_path, "rates", "bfloat16", copied=1 << 16, matrix=32)
    assert min(rates.values()) > 0
    steps = gpu_bench.step(tmp_path, "graphs", "float32")
    assert steps["replayed"] and list(steps["by_rows"]) == ["1", "8"]
    assert not gpu_bench.step(tmp_path, "eager", "float32")["replayed"]
    searched = gpu_bench.search(tmp_path, "graphs-auto", "float32")
    assert searched["replayed"] and searched["prompts"] == 6
    assert searched["trials_per_hour"] == pytest.approx(3600 / searched["seconds_per_trial"])


def test_what_was_found_is_written(gpu_bench: ModuleType, tmp_path: Path) -> None:
    gpu_bench.write(tmp_path / "results" / "gpu.json", "tiny", {"device rates bfloat16": {"error": "no"}})
    kept = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert kept["measurements"] and kept["versions"]["torch"] == version("torch") and kept["shape"] == "tiny"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(gpu_bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "CUDA" in said.err
