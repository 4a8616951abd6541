"""What is started where: the launcher's command line, the ranks' environment, hostfiles, the options of the scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from heretic_ds.errors import UserError
from heretic_ds.launching import __main__ as command
from heretic_ds.launching import nodes, plan, rank_guard
from heretic_ds.launching.plan import Launch, make_plan
from heretic_ds.launching.supervisor import Outcome, Supervisor, _Rank


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`machine(4)`: pretend to have four GPUs. At first there are none, and 8 cores."""

    def pretend(gpus: int) -> None:
        found = ["/dev/nvidiactl", "/dev/nvidia-uvm", *(f"/dev/nvidia{number}" for number in range(gpus))]
        monkeypatch.setattr(plan.glob, "glob", lambda pattern: found if gpus else [])

    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    pretend(0)
    return pretend


def after(made: plan.Plan, name: str) -> str:
    return made.command[made.command.index(name) + 1]


# One node


def test_ranks_share_the_cores_of_a_machine_without_gpus(tmp_path: Path) -> None:
    made = make_plan(Launch(("m", "a=[1, 2]"), ranks=2), tmp_path)
    assert made.command[-5:] == ["--no_local_rank", "--module", "heretic_ds", "m", "a=[1, 2]"]
    assert after(made, "--num_gpus") == "2"
    assert after(made, "--log_level") == "critical"
    assert made.environment["DS_ACCELERATOR"] == "cpu"
    assert made.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert made.environment["OMP_NUM_THREADS"] == "4"


def test_what_the_user_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    options = ("--quiet", "--bind_cores_to_rank")
    made = make_plan(Launch(ranks=2, master_port=4321, options=options, env={"X": "1"}), tmp_path)
    assert (made.environment["OMP_NUM_THREADS"], made.environment["X"]) == ("3", "1")
    assert after(made, "--master_port") == "4321"
    assert "--bind_cores_to_rank" in made.command
    assert "--log_level" not in made.command


def test_ranks_take_the_gpus(tmp_path: Path, machine: Callable[[int], None]) -> None:
    machine(4)
    made = make_plan(Launch(), tmp_path)
    assert after(made, "--num_gpus") == "4"
    assert "DS_ACCELERATOR" not in made.environment
    assert "OMP_NUM_THREADS" not in made.environment
    assert after(make_plan(Launch(ranks=2), tmp_path), "--num_gpus") == "2"
    with pytest.raises(UserError, match="5 ranks on 4 GPUs"):
        make_plan(Launch(ranks=5), tmp_path)


def test_chosen_gpus_are_taken(tmp_path: Path, machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    made = make_plan(Launch(), tmp_path)
    assert after(made, "--include") == "localhost:3,1"
    assert "CUDA_VISIBLE_DEVICES" not in made.environment, "the launcher would say that it ignores it"
    assert after(make_plan(Launch(ranks=1), tmp_path), "--include") == "localhost:3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    with pytest.raises(UserError, match="MIG-1234"):
        make_plan(Launch(), tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make_plan(Launch(), tmp_path).environment["DS_ACCELERATOR"] == "cpu"


def test_another_accelerator_is_left_to_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    made = make_plan(Launch(ranks=2), tmp_path)
    assert made.environment["DS_ACCELERATOR"] == "xpu"
    assert "OMP_NUM_THREADS" not in made.environment


# Several nodes


def test_every_node_has_the_same_world(tmp_path: Path) -> None:
    made = [
        make_plan(Launch(ranks=2, nodes=2, node_rank=node, master_addr="first", master_port=77), tmp_path)
        for node in range(2)
    ]
    assert [after(each, "--node_rank") for each in made] == ["0", "1"]
    for each in made:
        assert "--no_ssh" in each.command
        assert after(each, "--include") == "node0:0,1@node1:0,1"
        assert (after(each, "--master_addr"), after(each, "--master_port")) == ("first", "77")
        assert Path(after(each, "--hostfile")).read_text() == "node0 slots=2\nnode1 slots=2\n"


def test_nodes_agree_on_a_port_that_nobody_gave(tmp_path: Path) -> None:
    made = make_plan(Launch(ranks=1, nodes=2, node_rank=1), tmp_path)
    assert after(made, "--master_port") == str(plan.DEFAULT_PORT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": 0}, "-n 0"),
        ({"nodes": 0}, "--nodes 0"),
        ({"nodes": 2, "ranks": 1, "node_rank": 2}, "--node-rank 2 is not below --nodes 2"),
        ({"nodes": 2}, "needs -n"),
        ({"options": ("four",)}, "'four' is not an option"),
    ],
)
def test_impossible_launches_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Launch(**values)


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\n\nfirst slots=4 # fast\n  second   slots=2\n")
    assert nodes.read_hostfile(file) == {"first": 4, "second": 2}
    assert nodes.read_hostfile(file, 1) == {"first": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("first\n", "line 1: found 'first'"),
        ("first slots=0\n", "line 1"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("a slots=1\na slots=1\n", "line 2: a is listed twice"),
        ("# nothing\n", "names no host"),
        ("a slots=1\n", "--nodes 2: .* lists 1 hosts"),
    ],
)
def test_a_wrong_hostfile_is_explained(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(UserError, match=message):
        nodes.read_hostfile(tmp_path / "hosts", 2)


def test_uneven_hosts_need_a_number() -> None:
    with pytest.raises(UserError, match="add -n"):
        nodes.Cluster(Launch(), {"a": 2, "b": 4})
    nodes.Cluster(Launch(ranks=2), {"a": 2, "b": 4})


# The command line


def test_the_first_foreign_word_ends_the_launchers_options() -> None:
    options, arguments = command._parse(["-n", "2", "--deepspeed=--quiet", "model", "-n", "3", "--cfg", "job"])
    assert (options.ranks, options.deepspeed) == (2, ["--quiet"])
    assert arguments == ["model", "-n", "3", "--cfg", "job"]
    assert command._parse(["--cfg", "job"])[1] == ["--cfg", "job"]
    assert command._parse(["-n", "1", "--", "-x"])[1] == ["-x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "two", "m"], "invalid int value: 'two'"),
        (["-n"], "expected one argument"),
        (["-n", "0", "m"], "-n 0"),
        (["--nodes", "2", "-n", "1", "m"], "--node-rank"),
        (["--node-rank", "1", "-n", "1", "m"], "--nodes"),
        (["--hostfile", "nowhere", "m"], "nowhere cannot be read"),
        (["m", "--multirun", "search.seed=1,2"], "hydra/launcher=deepspeed"),
        (["m", "search.trails=1"], "search.trails"),
        (["-n", "2"], "no model given"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda self: pytest.fail("started"))
    assert command.main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_the_outcome_is_shown_and_returned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "run", lambda self: Outcome(1, "heretic-ds: rank 1 is gone"))
    assert command.main(["m", "prompts=demo"]) == 1
    assert capsys.readouterr().err == "heretic-ds: rank 1 is gone\n"


# Whose fault it was


def rank(number: int, ended: float | None = None, word: float | None = None, returned: int | None = None) -> _Rank:
    made = _Rank(number, None, ended=ended, returned=returned)
    if word is not None:
        made.status, made.text, made.time = 1, "broken", word
    return made


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        ([rank(0, ended=5.0, word=4.0), rank(1, ended=4.5, word=4.2)], 0),
        ([rank(0, ended=5.0, word=4.1), rank(1, ended=4.0)], 1),
        ([rank(0, ended=5.0, word=4.0), rank(1, ended=4.9)], 0),
        ([rank(0, ended=4.0, word=3.9), rank(1, ended=5.0, returned=-15)], 0),
        ([rank(0, ended=5.0, returned=-15), rank(1, ended=4.0, returned=-9)], 1),
        ([rank(0, ended=4.0, returned=0), rank(1, ended=5.0, word=4.9)], 1),
        ([rank(0), rank(1, word=4.0)], 1),
        ([rank(0, ended=4.0, returned=1), rank(1, ended=4.0, returned=-9)], 1),
        ([rank(0, ended=4.0, returned=-15), rank(1, ended=4.0, returned=1)], 1),
        ([rank(0, ended=4.0, word=3.9, returned=1), rank(1, ended=4.0, returned=-15)], 0),
        ([rank(0, ended=4.0, returned=0), rank(1)], None),
    ],
)
def test_the_first_cause_is_found(ranks: list[_Rank], cause: int | None) -> None:
    supervisor = Supervisor(Launch(ranks=2))
    supervisor._ranks = {each.number: each for each in ranks}
    found = supervisor._first_cause()
    assert (found.number if found else None) == cause


# The rank's own side


def test_without_a_launcher_nothing_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rank_guard, "die_with_parent", lambda: pytest.fail("guarded"))
    assert rank_guard.run(lambda: 3) == 3
    assert rank_guard.leave_word("x", 1) is False


def test_the_first_word_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(rank_guard.FOLDER, str(tmp_path))
    monkeypatch.setattr(rank_guard, "_entered", True)
    assert rank_guard.leave_word("the cause", 2)
    assert rank_guard.leave_word("a consequence", 1)
    word = json.loads((tmp_path / "rank-1.json").read_text())
    assert (word["text"], word["status"], word["pid"]) == ("the cause", 2, os.getpid())
