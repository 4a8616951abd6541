"""Which commands start ranks by themselves, and which say how several GPUs are used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from heretic_ds import cli
from heretic_ds.errors import UserError
from heretic_ds.launching import own_ranks
from heretic_ds.launching.own_ranks import advice, ranks_to_start
from tests.conftest import ComposeSettings


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpus(2)`: a machine with two GPUs, as far as anybody asks."""

    def give(count: int) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return give


@pytest.mark.parametrize(
    ("devices", "words", "ranks"),
    [
        (4, [], 0),
        (4, ["run.launch=auto"], 4),
        (4, ["run.launch=3"], 3),
        (1, ["run.launch=auto"], 0),
        (0, ["run.launch=auto"], 0),
        (0, ["run.launch=2"], 2),
        (1, ["run.launch=1"], 1),
        (1, ["run.launch=2", "model.device=cpu"], 2),
        (4, ["run.launch=auto", "task=evaluate"], 4),
        (4, ["run.launch=auto", "task=chat"], 0),
        (4, ["run.launch=auto", "task=plan"], 0),
    ],
)
def test_ranks_are_started_as_asked(
    devices: int, words: list[str], ranks: int, gpus: Callable[[int], None], compose_settings: ComposeSettings
) -> None:
    gpus(devices)
    assert ranks_to_start(compose_settings(*words)) == ranks


def test_ranks_start_none(gpus: Callable[[int], None], compose_settings: ComposeSettings, monkeypatch: Any) -> None:
    gpus(2)
    settings = compose_settings("run.launch=auto")
    monkeypatch.setenv("RANK", "1")
    assert ranks_to_start(settings) == 0
    assert advice(compose_settings(), []) is None


def test_more_ranks_than_gpus_are_refused(gpus: Callable[[int], None], compose_settings: ComposeSettings) -> None:
    gpus(2)
    with pytest.raises(UserError, match=r"^run\.launch=3, but 2 GPUs can be used here; set run\.launch=auto"):
        ranks_to_start(compose_settings("run.launch=3"))


def test_idle_gpus_are_spoken_of(
    gpus: Callable[[int], None], compose_settings: ComposeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/heretic-ds"])
    gpus(2)
    words = ["my model", "search.trials=3"]
    told = advice(compose_settings(), words)
    assert told is not None and "2 GPUs" in told
    assert told.endswith(": /usr/bin/heretic-ds 'my model' search.trials=3 run.launch=auto")
    monkeypatch.setattr(sys, "argv", ["/lib/heretic_ds/__main__.py"])
    assert f"{sys.executable} -m heretic_ds 'my model'" in str(advice(compose_settings(), words))
    for quiet in ("run.launch=1", "model.device=cpu", "model.device=cuda:1", "task=chat", "task=plan"):
        assert advice(compose_settings(quiet), words) is None
    gpus(1)
    assert advice(compose_settings(), words) is None


def test_the_command_hands_its_words_on_and_takes_the_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    started = []

    def start(job: Any) -> int:
        started.append(job._launch)
        return 130

    monkeypatch.setattr(own_ranks, "supervise", start)
    words = ["some model", "run.launch=2", "model.device=cpu", "search.trials=3"]
    assert cli.main(words) == 130
    [launch] = started
    assert (list(launch.arguments), launch.ranks) == (words, 2)
    assert launch.env["DS_ACCELERATOR"] == "cpu"


def test_a_sweep_is_told_how_its_jobs_get_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["m", "-m", "search.seed=0,1", "run.launch=2"]) != 0
    assert "run.launch=2 is for a single run" in capsys.readouterr().err
