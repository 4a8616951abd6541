"""``run.launch=2``: the command starts its ranks, which choose their placements, and ends as they do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from heretic_ds.launching.rank_guard import is_alive
from tests.e2e.conftest import Material, Started, read_results

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture
def launched(start: Callable[[list[str]], Started], material: Material) -> Callable[..., Started]:
    """`launched("search.trials=3")`: the command with two ranks, in the background."""

    def begin(*words: str) -> Started:
        return start(material.words(material.model("llama"), "run.launch=2", "run.dir=run", *words))

    return begin


def test_a_job_on_ranks_of_its_own(launched: Callable[..., Started], tmp_path: Path) -> None:
    command = launched("search.trials=3")
    assert command.end() == 0, command.said()
    results = read_results(tmp_path / "run")
    assert results["world"] == {
        "size": 2,
        "capture": {"placement": "replicated", "degree": 1},
        "evaluate": {"placement": "replicated", "degree": 1},
    }
    assert len(results["trials"]) == 3 and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    [chosen] = [line for line in command.said().splitlines() if line.startswith("capture and evaluate=replicated")]
    assert "2 devices of local" in chosen


@pytest.mark.thorough
def test_a_mistake_of_ranks_is_one_line(launched: Callable[..., Started]) -> None:
    refused = launched("prompts.target.train.source=nowhere.txt")
    assert refused.end() == 2
    [line] = refused.said().splitlines()
    assert line.startswith("heretic-ds: prompts.target.train.source: ")


@pytest.mark.thorough
def test_ctrl_c_ends_the_search_and_then_everything(launched: Callable[..., Started]) -> None:
    command = launched("search.trials=100000")
    command.wait_until(lambda: "trial      1" in command.said())
    ranks = psutil.Process(command.process.pid).children(recursive=True)
    assert len(ranks) > 2
    command.send(signal.SIGINT)
    command.wait_until(lambda: "Ctrl-C again ends everything" in command.said())
    command.send(signal.SIGINT)
    assert command.end() == 130
    assert command.said().splitlines()[-1] == "heretic-ds: interrupted"
    assert not [process for process in ranks if is_alive(process)]
