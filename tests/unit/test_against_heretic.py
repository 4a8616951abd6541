"""What can be said of the comparison with Heretic without Heretic: its models, its arithmetic, how tools are asked."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic_ds.ablation import Edit
from tests.conftest import ROOT, benchmark

main, models, report, worker = (
    benchmark(f"against_heretic{part}") for part in ("", "_models", "_report", "_worker")
)  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), [("30m", 31), ("135m", 135), ("8b", 8030)])
def test_shapes_have_about_the_parameters_of_their_names(name: str, millions: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**({"tie_word_embeddings": True} | models.CASES[name].config)))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_answers_of_a_random_model_never_end_and_half_hold_a_marker(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    case = replace(models.CASES["tiny"], evaluated=32)
    told = models.prepare(case, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(told["model"])
    model = AutoModelForCausalLM.from_pretrained(told["model"])
    texts = (tmp_path / "target" / "test.txt").read_text().splitlines()
    assert told["counts"] == {"target_train": 6, "target_eval": 32, "baseline_train": 6, "baseline_eval": 32}
    chats = [[{"role": "system", "content": told["system"]}, {"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(rendered, padding=True, add_special_tokens=False, return_tensors="pt")
    answer_BS = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert answer_BS.shape == (32, 6) and answer_BS.min() >= len(models.SPECIAL)
    assert len({tuple(row) for row in answer_BS.tolist()}) > 16
    answers = tokenizer.batch_decode(answer_BS)
    held = sum(any(marker in answer for marker in told["markers"]) for answer in answers)
    assert 8 <= held <= 20
    file = tmp_path / "case.json"
    stamp = file.stat().st_mtime_ns
    assert models.prepare(case, tmp_path) == told and file.stat().st_mtime_ns == stamp  # kept for the next call


def test_markers_are_in_half_of_the_answers() -> None:
    answers = ["a b", "a c", "d e", "d f"]
    assert models.markers_of_half(answers) == ["a"]
    # w1 and w9 are in too many answers, w1 even within w10; w2 adds nothing to w10.
    assert models.markers_of_half(["w1 w9"] * 3 + ["w2 w10"]) == ["w10"]
    assert models.markers_of_half(["x"] * 4) == []


def test_edits_are_those_of_a_search_and_the_same_every_time() -> None:
    drawn = models.edits(6, 9)
    assert drawn == models.edits(6, 9) and drawn[:3] == models.edits(6, 3) and drawn != models.edits(6, 9, seed=1)
    assert [edit["direction_index"] is None for edit in drawn] == [False, False, True] * 3
    assert all(Edit.from_dict(edit).strength("mlp", 4) >= 0 for edit in drawn)


def reply(seconds: float, scores: list[tuple[float, float]], **parts: float) -> dict[str, Any]:
    told = [{"refusals": refusals, "kl": kl} for refusals, kl in scores]
    result = {"scores": told, "parts": parts, "processor_parts": parts}
    return {"seconds": seconds, "processor_seconds": seconds / 2, "result": result}


def test_seconds_are_those_of_a_trial_in_the_median_turn() -> None:
    turns = [reply(8, [], kl=4, generation=2), reply(4, [], kl=3, rest=1), reply(999, [], kl=996)]
    found = report.summary(turns, together=4)
    assert (
        found["seconds_per_trial"] == 2
        and found["trials"] == 12
        and found["trials_per_hour"] == pytest.approx(3600 * 12 / 1011, abs=0.1)
    )
    assert found["parts"]["kl"]["clock"] == 1 and found["parts"]["edit"]["clock"] == 0
    assert found["seconds"][:2] == [2, 1] and found["processor_seconds_per_trial"] == 1


def test_ratios_are_those_of_all_turns() -> None:
    tools = {tool: {"seconds": taken, "processor_seconds": taken} for tool, taken in zip(
        report.TOOLS, ([10, 20, 30], [5, 2, 3], [1, 1, 1]), strict=True
    )}  # fmt: skip
    found = report.ratios({"tools": tools, "peak_bytes": {report.THEIRS: 4, report.OURS: 3}})
    assert found["same_tokens_clock"] == 6 and found["early_stop_processor"] == 20 and found["peak_memory"] == 0.75


def scores(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"refusals": refusals, "kl": kl} for refusals, kl in pairs]


def test_agreement_is_equal_refusals_and_close_kl() -> None:
    ours = scores((3, 0.1), (0, 2.0))
    found = {report.THEIRS: scores((3, 0.10005), (0, 2.0)), report.OURS: ours, report.STOPPING: ours}
    assert report.agreement(found, "pre")["agrees"]
    assert report.agreement({**found, report.THEIRS: scores((3, 0.1002), (0, 2.0))}, "none")["agrees"] is False
    other = report.agreement({**found, report.THEIRS: scores((3, 0.1), (1, 2.0))}, "none")
    assert other["agrees"] is False and other["refusals_equal"] == 1 and other["largest_difference_of_refusals"] == 1
    assert report.agreement(found, "full")["agrees"] is None
    stopped = report.agreement({**found, report.STOPPING: scores((3, 0.1), (1, 2.0))}, "pre")
    assert stopped["agrees"] and not stopped["early_stop_changes_nothing"]


def cell(row_norm: str, theirs: float, ours: float, stopping: float) -> dict[str, Any]:
    seconds = {report.THEIRS: theirs, report.OURS: ours, report.STOPPING: stopping}
    stages = {stage: {"seconds": 1.0} for stage in ("open", "capture")}
    figures = {
        "row_norm": row_norm,
        "tools": {tool: report.summary([reply(taken, [], kl=taken)], 1) for tool, taken in seconds.items()},
        "stages": {tool: stages for tool in (report.THEIRS, report.OURS)},
        "peak_bytes": {report.THEIRS: 200 * 2**20, report.OURS: 150 * 2**20},
        "agreement": {"agrees": None if row_norm == "full" else theirs < 50},
    }
    return figures | {"ratios": report.ratios(figures)}


def test_aims_are_measured_on_the_default_edit() -> None:
    measured = {"none": cell("none", 99, 9, 9), "full": cell("full", 12, 3, 1.5)}
    assert measured["full"]["ratios"]["same_tokens_clock"] == 4
    speed, memory, same = report.aims("demo", measured)
    assert speed["found"] == 8 and not speed["met"] and memory["found"] == 0.75 and memory["met"]
    assert same["different"] == ["none"] and not same["met"]
    assert report.aims("135m", {"full": cell("full", 12, 3, 1.5)})[0]["met"]
    assert len(report.aims("30m", measured)) == 2


def test_table_and_file_hold_every_model(tmp_path: Path) -> None:
    case = {"threads": 1, "cells": {"full, own batches": cell("full", 12, 3, 1.5)}}
    lines = report.table({"demo": case}).splitlines()
    assert len(lines) == 2 + 3 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| 2400 | 8.00 |" in lines[-1] and lines[2].endswith("| 200 |") and lines[3].endswith("| 150 |")
    file = tmp_path / "results" / "against.json"
    report.write(file, {"30m": case}, list(models.CASES))
    report.write(file, {"demo": case}, list(models.CASES))
    assert list(json.loads(file.read_text())["cases"]) == ["demo", "30m"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_tool_is_asked_one_thing_at_a_time(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "from against_heretic_worker import serve\n"
        "def twice(number):\n    print('a word that is no reply'); return 2 * number\n"
        "def fails():\n    raise ValueError('no such thing')\n"
        "serve({'twice': twice, 'fails': fails})\n"
    )
    tool = worker.Worker(Path(sys.executable), script, 1, tmp_path / "tool.log", tmp_path)
    try:
        told = tool.ask("twice", number=21)
        assert told["result"] == 42 and told["seconds"] >= 0 and told["peak_bytes"] > 1 << 20
        with pytest.raises(RuntimeError, match="no such thing"):
            tool.ask("fails")
        assert tool.ask("twice", number=1)["result"] == 2
    finally:
        tool.close()
    assert "a word that is no reply" in (tmp_path / "tool.log").read_text()


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--heretic-python", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "make bench-setup" in said and len(said.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_large_shape_asks_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--shape", "8b"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "CUDA" in said.err
