"""Sweeps through `hydra/launcher=deepspeed`, with a quick script in the place of DeepSpeed's launcher and its ranks."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from heretic_ds import cli
from heretic_ds.launching import plan, supervisor
from heretic_ds.launching.plan import Launch, Plan

RANK = """
import json, os, signal, sys
from heretic_ds.launching import rank_guard

def main():
    values = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    folder = values["run.dir"].strip("'")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "given.json"), "w") as file:
        json.dump({"words": sys.argv[1:], "X": os.environ.get("X")}, file)
    seed = int(values.get("search.seed", 0))
    if seed == 1:
        rank_guard.leave_word("heretic-ds: the model is not there", 2)
        return 2
    if seed == 2:
        rank_guard.leave_word("Traceback (most recent call last):\\nRuntimeError: broken", 1, shared=False)
        return 1
    if seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 4:
        rank_guard.leave_word("heretic-ds: interrupted", 130)
        return 130
    verified = None if seed == 5 else {"refusals": 3, "kl": 0.25}
    with open(os.path.join(folder, "results.json"), "w") as file:
        json.dump({"prompts": {"target_eval": 12}, "verified": verified}, file)
    return 0

os.environ["RANK"] = "0"
sys.exit(rank_guard.run(main))
"""


@pytest.fixture(autouse=True)
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What the launcher was told to start; one rank without DeepSpeed is started for it, in an empty folder."""
    told: list[Launch] = []
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def make_plan(launch: Launch, folder: Path) -> Plan:
        told.append(launch)
        root = str(Path(plan.__file__).parents[2])
        return Plan([sys.executable, str(script), *launch.arguments], {**os.environ, **launch.env, "PYTHONPATH": root})

    monkeypatch.setattr(supervisor, "make_plan", make_plan)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield told


def sweep(*words: str) -> int:
    return cli.main(["m", "--multirun", "hydra/launcher=deepspeed", *words])


def rows() -> list[dict]:
    [file] = Path("runs/sweeps").glob("*/summary.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def given(number: int) -> dict:
    [file] = Path("runs/sweeps").glob(f"*/{number}/given.json")
    return json.loads(file.read_text())


def test_hydra_finds_it() -> None:
    assert "DeepSpeedLauncher" in {found.__name__ for found in Plugins.instance().discover(Launcher)}


def test_every_job_gets_ranks_and_words_and_a_folder(launches: list[Launch]) -> None:
    fields = ["hydra.launcher.num_gpus=2", "hydra.launcher.master_port=1234", "+hydra.launcher.env.X='a b'"]
    fields += ["run.interactive=true", "hydra.launcher.options=['--bind_cores_to_rank']"]
    status = sweep(*fields, "search.seed=0,6", "scoring.markers=['a,b']")
    assert status == 0
    assert {(launch.ranks, launch.master_port, launch.options) for launch in launches} == {
        (2, 1234, ("--bind_cores_to_rank",))
    }
    for number, seed in enumerate((0, 6)):
        folder = next(Path("runs/sweeps").iterdir()) / str(number)
        found = given(number)
        assert found["X"] == "a b"
        assert [word for word in found["words"] if "=" in word] == [
            "model.path='m'",
            f"search.seed={seed}",
            "scoring.markers=['a,b']",
            f"run.dir='{folder}'",
        ]
        settings = cli.compose([word for word in found["words"] if "=" in word])
        assert (settings.run.dir, settings.scoring.markers) == (str(folder), ["a,b"])


def test_the_summary_tells_what_became_of_every_job(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("search.seed=0,1,2,3,5,-1,6") == 1
    found = rows()
    assert [row["job"] for row in found] == list(range(7))
    assert [row["status"] for row in found] == [0, 2, 1, 1, 0, 2, 0]
    assert [row["refusal_rate"] for row in found] == [0.25, None, None, None, None, None, 0.25]
    assert [row["kl"] for row in found] == [0.25, None, None, None, None, None, 0.25]
    assert found[1]["message"] == "the model is not there"
    assert found[2]["message"] == "RuntimeError: broken"
    assert found[3]["message"].startswith("rank 0 was ended by signal 9 (SIGKILL)")
    assert "search.seed" in found[5]["message"], "refused before any rank was started"
    shown = capfd.readouterr()
    assert shown.err.count("heretic-ds: the model is not there\n") == 1
    assert "7 jobs, 4 failed" in shown.out


def test_the_sweeper_gets_the_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    returned = []
    launch = BasicSweeper.sweep

    def listening(self: BasicSweeper, arguments: list[str]) -> object:
        jobs = launch(self, arguments)
        returned.extend(job.return_value for batch in jobs for job in batch)
        return jobs

    monkeypatch.setattr(BasicSweeper, "sweep", listening)
    assert sweep("search.seed=0,1,5") == 1
    assert returned[0] == (0.25, 0.25)
    assert all(math.isnan(number) for number in returned[1])
    assert returned[2] is None


def test_an_interrupted_job_ends_the_sweep() -> None:
    assert sweep("search.seed=0,4,6") == 130
    assert [row["job"] for row in rows()] == [0]


def test_other_configuration_reaches_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nsearch:\n  seed: 7\n")
    assert sweep("--config-dir", str(tmp_path / "mine"), "experiment=own") == 0
    words = given(0)["words"]
    assert words[words.index("--config-dir") + 1] == str(tmp_path / "mine")
    assert "experiment=own" in words


def test_a_run_folder_of_ones_own_is_kept() -> None:
    assert sweep("run.dir=here,there") == 0
    assert [json.loads(Path(name, "given.json").read_text())["words"][-1] for name in ("here", "there")] == [
        "run.dir='here'",
        "run.dir='there'",
    ]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("num_gpus=0", "-n 0"),
        ("num_nodes=2", "hydra.launcher.hostfile"),
        ("hostfile=nowhere", "nowhere cannot be read"),
        ("options=[stray]", "'stray' is not an option"),
        ("ranks=2", "ranks"),
    ],
)
def test_a_wrong_field_is_one_line(field: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(f"hydra.launcher.{field}", "search.seed=0,1") == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not list(Path().glob("runs/sweeps/*/summary.jsonl"))


def test_the_fields_are_documented_by_the_schema() -> None:
    from hydra_plugins.heretic_ds_launcher.deepspeed_launcher import DeepSpeedLauncherConf

    fields = OmegaConf.structured(DeepSpeedLauncherConf)
    assert [name for name in fields if name != "_target_"] == [
        "num_gpus",
        "hostfile",
        "num_nodes",
        "master_port",
        "options",
        "env",
    ]
