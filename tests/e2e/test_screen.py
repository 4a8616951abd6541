"""What somebody sees at a terminal: nothing wider than it, nothing silent for long, the first word at once."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.pseudo_terminal import HERETIC, ROOT, Terminal

ONE_CORE = {"OMP_NUM_THREADS": "1"}
DEMO = ("experiment=demo", "run.interactive=false", "search.trials=4", "search.startup_trials=2")
STAGES = (
    "opening", "loading", "response prefix", "capture", "the original's scores", "search", "verification", "export",
    "final scores",
)  # fmt: skip
SILENT = 3.0
"""Seconds: more than that without output is a screen that looks dead."""


def lines_written(text: str) -> list[str]:
    """Every line as it was sent, control codes left out: what a terminal would have to fold is longer than it."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("columns", [60, 120])
def test_no_line_of_the_demo_is_wider_than_the_terminal(columns: int, tmp_path: Path) -> None:
    with Terminal([*HERETIC, *DEMO], tmp_path, columns, env=ONE_CORE) as terminal:
        status, shown = terminal.end(), terminal.shown
    assert status == 0, terminal.text
    lines = lines_written(terminal.text)
    assert [line for line in lines if cell_len(line) > columns] == []
    said = " ".join(" ".join(shown).split())  # folded between words
    assert shown[0].startswith("heretic-ds ")
    for fact in (
        "200 of 200 prompts of pkg://heretic_ds/demo/prompts/target_train.txt", "878 k parameters, 6 blocks", "CPU: ",
        "float32 (model.dtype=float32)", "since there is one rank", "response prefix: none", "batch size for answers:",
    ):  # fmt: skip
        assert fact in said, fact
    header = next(place for place, line in enumerate(shown) if "refusals" in line and "KL" in line)
    rows = [line.split() for line in shown[header + 1 : header + 5]]
    assert [row[1] if row[0] == "*" else row[0] for row in rows] == ["0", "1", "2", "3"] and rows[0][0] == "*"
    numbers = [row[2:4] if row[0] == "*" else row[1:3] for row in rows]
    assert all(re.fullmatch(r"\d+/67", refusals) and float(kl) >= 0 for refusals, kl in numbers)
    assert "Pareto front" in said and not [line for line in shown if "…" in line]


def test_no_stage_is_silent(tmp_path: Path) -> None:
    """Every stage takes longer than a person waits without asking whether it hangs."""
    command = [sys.executable, "-m", "tests.slowed", *DEMO, "search.trials=1", "search.startup_trials=1"]
    command.remove("search.trials=4"), command.remove("search.startup_trials=2")
    with Terminal(command, tmp_path, 80, env=ONE_CORE) as terminal:
        assert terminal.end() == 0, terminal.text
    seconds, before = terminal.longest_silence()
    assert seconds < SILENT, f"{seconds:.1f} s of silence after {before!r}"
    text = "\n".join(lines_written(terminal.text))
    for stage in STAGES:
        assert re.search(rf"^\S {re.escape(stage)} .*0:03", text, re.MULTILINE), f"{stage} was not shown for 3 s"


@pytest.mark.thorough
@pytest.mark.timeout(1500)
def test_no_stage_of_a_real_model_is_silent(tmp_path: Path) -> None:
    folder = os.environ.get("HERETIC_REAL_MODEL") or str(ROOT / ".models" / "SmolLM2-135M-Instruct")
    if not Path(folder, "config.json").is_file():
        pytest.skip("no real model: run `make demo-real`, or set HERETIC_REAL_MODEL to the folder of one")
    words = ("prompts=demo", "scoring.markers=[a,e]", "search.trials=2", "run.interactive=false", "run.dir=run")
    parts = [
        f"prompts.{kind}.{part}.slice=0:24" for kind in ("target", "baseline") for part in ("train", "eval", "test")
    ]
    short = ("generation.max_new_tokens=20", "verify.answer_tokens=20", "export.max_kl=50", *parts)
    with Terminal([*HERETIC, folder, *words, *short], tmp_path, 80) as terminal:
        assert terminal.end(timeout=1500) == 0, terminal.text
    seconds, before = terminal.longest_silence()
    assert seconds < SILENT, f"{seconds:.1f} s of silence after {before!r}"


def test_the_first_word_comes_before_anything_slow_is_imported(tmp_path: Path) -> None:
    with Terminal([*HERETIC, str(tmp_path / "nowhere")], tmp_path, 80) as terminal:
        assert terminal.end() == 2
    at, first = terminal.written[0]
    assert first.startswith("heretic-ds 0.") and at < 3.0
    assert terminal.shown[-1].startswith(("heretic-ds: ", "check ")) or "heretic-ds: " in terminal.text
