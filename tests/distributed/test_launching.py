"""The real launcher around ranks that fail in every way: none is left, and the user hears the cause last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from heretic_ds.launching.plan import free_port
from heretic_ds.launching.rank_guard import is_alive
from tests import families
from tests.conftest import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

RUN = ROOT / "launch" / "run.sh"
STANDIN = ("--module", "tests.distributed.standin")
STARTED = 150.0
"""Seconds within which ranks have to run; on a busy machine imports alone take a minute."""
ENOUGH = 60.0
"""Seconds within which everything has to have ended after what ends it."""


class Job:
    """A launched command with its output in files, and the processes of its ranks."""

    def __init__(self, folder: Path, *command: str | os.PathLike[str], ranks: int = 2, **environment: str) -> None:
        self.folder, self.ranks = folder, ranks
        self._files = [(folder / name).open("w") for name in ("stdout", "stderr")]
        (folder / "tmp").mkdir(exist_ok=True)
        own = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
        variables = os.environ | own | environment
        variables.pop("OMP_NUM_THREADS", None)
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
            # Tests may run under nohup, whose ignored signal a shell cannot trap.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def words(self) -> dict[int, dict]:
        """What each rank was given."""
        files = self.folder.glob("ranks/[0-9].json")
        return {int(file.stem): json.loads(file.read_text()) for file in files}

    def started(self) -> list[psutil.Process]:
        """Wait until every rank runs; the ranks."""
        self.until(lambda: len(self.words) == self.ranks or self.process.poll() is not None, STARTED)
        assert len(self.words) == self.ranks, self.stderr
        processes = []
        for _, words in sorted(self.words.items()):
            with suppress(psutil.NoSuchProcess):  # it may have misbehaved already
                processes.append(psutil.Process(words["pid"]))
        self._seen = {process.pid: process for process in [*self._tree(), *processes]}
        return processes

    def ended(self) -> int:
        """Wait for the command and for every process it started; the exit status."""
        status = self.process.wait(ENOUGH if self._seen else STARTED)
        self.until(lambda: not any(map(is_alive, self._seen.values())))
        return status

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def close(self) -> None:
        """End the whole process tree, whatever the test came to."""
        for process in [*self._tree(), *self._seen.values()]:
            if is_alive(process):
                process.kill()
        self.process.kill()
        self.process.wait()
        for file in self._files:
            file.close()

    def _tree(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def until(self, condition: Callable[[], bool], seconds: float = ENOUGH) -> None:
        """Wait for what is to happen within so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"nothing happened in {seconds} s\n{self.stdout}\n{self.stderr}"
            time.sleep(0.05)


Launch = Callable[..., Job]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`launch("hang", *words)`: run.sh with two stand-in ranks, in an empty folder."""
    jobs: list[Job] = []
    (tmp_path / "ranks").mkdir()

    def start(
        behaviour: str,
        *words: str,
        options: tuple[str | os.PathLike[str], ...] = ("-n", "2"),
        script: tuple[str | os.PathLike[str], ...] = (RUN,),
        folder: Path = tmp_path,
        **more: str,
    ) -> Job:
        if not (folder / "ranks").exists():
            folder.mkdir(exist_ok=True)
            (folder / "ranks").symlink_to(tmp_path / "ranks")
        jobs.append(Job(folder, *script, *options, *STANDIN, tmp_path / "ranks", behaviour, *words, **more))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def test_words_arrive_intact_and_one_rank_speaks(launch: Launch, tmp_path: Path) -> None:
    words = ["a=[1,2, 3]", "b={x: 1, y: '*'}", "c='it\\'s \"$HOME\" `id`; #\\\\'", "", "--flag", "d=ü\nz", "-m"]
    job = launch("end_well", *words, X="kept")
    assert job.ended() == 0
    cores = len(os.sched_getaffinity(0))
    for rank in range(2):
        found = job.words[rank]
        assert found["words"] == words
        assert found["cwd"] == str(tmp_path)
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert (found["DS_ACCELERATOR"], found["X"]) == ("cpu", "kept")
        assert found["OMP_NUM_THREADS"] == str(max(cores // 2, 1))
    assert job.stdout == "output of rank 0\n"
    assert job.stderr == ""
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_mistake_is_one_line_and_status_2(launch: Launch) -> None:
    job = launch("all_find_the_same")
    assert job.ended() == 2
    assert job.stderr == "heretic-ds: there is no such model\n"
    assert job.stdout == "output of rank 0\n"


def test_what_one_rank_alone_finds_is_said_and_ends_all(launch: Launch) -> None:
    job = launch("second_finds_something")
    job.started()
    assert job.ended() == 2
    assert job.stderr == "heretic-ds: the disk of rank 1 is full\n"


def test_the_first_crash_is_told_last_and_its_consequences_are_not(launch: Launch) -> None:
    job = launch("second_crashes")
    assert job.ended() == 1
    first, *rest = job.stderr.splitlines()
    assert first.startswith("rank 1 failed (the output of ranks above 0 is in ")
    assert rest == ["Traceback (most recent call last):", "  ...", "RuntimeError: broken"]
    logs = Path(first.removesuffix("):").rpartition(" ")[2])
    assert "what rank 1 had to say" in (logs / "rank-1.log").read_text()


def test_a_killed_rank_ends_the_others_that_will_not(launch: Launch) -> None:
    job = launch("hang_on")
    ranks = job.started()
    ranks[1].kill()
    assert job.ended() == 1
    assert "heretic-ds: rank 1 was ended by signal 9 (SIGKILL)" in job.stderr.splitlines()[-1]


def test_a_rank_killed_in_a_pass_that_gathers_weights_ends_all(launch: Launch, tmp_path: Path) -> None:
    job = launch("gather_weights", str(families.save("llama", tmp_path / "model")))
    ranks = job.started()
    job.until(lambda: len(list(tmp_path.glob("ranks/*.passed"))) == 2)
    ranks[1].kill()
    assert job.ended() == 1
    assert "rank 1 was ended by signal 9 (SIGKILL)" in job.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_rank(launch: Launch, number: signal.Signals) -> None:
    job = launch("hang")
    job.started()
    job.process.send_signal(number)
    assert job.ended() == 128 + number
    assert job.stderr == f"heretic-ds: ended by {number.name}\n"


def test_ctrl_c_lets_rank_0_come_to_an_end(launch: Launch) -> None:
    job = launch("stop_when_asked")
    job.started()
    time.sleep(1)  # until rank 0 listens
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.ended() == 0
    assert job.stdout == "output of rank 0\nrank 0 stopped\n"
    assert job.stderr == ""


def test_ctrl_c_twice_ends_everything(launch: Launch, tmp_path: Path) -> None:
    job = launch("notice_and_hang")
    job.started()
    time.sleep(1)
    os.killpg(job.process.pid, signal.SIGINT)
    job.until((tmp_path / "ranks" / "stopped").exists)
    assert job.process.poll() is None
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.ended() == 130
    assert job.stderr == "heretic-ds: interrupted\n"


def test_ranks_do_not_outlive_a_killed_launcher(launch: Launch) -> None:
    job = launch("hang_on")
    job.started()
    job.process.kill()
    job.ended()


def test_ranks_do_not_outlive_a_bare_deepspeed_that_was_ended(launch: Launch) -> None:
    bare = (sys.executable, "-c", "from deepspeed.launcher.runner import main; main()")
    options = ("--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank")
    job = launch("hang", script=bare, options=options, DS_ACCELERATOR="cpu")
    job.started()
    job.process.terminate()
    job.ended()


# Several nodes


def test_two_nodes_on_one_machine(launch: Launch, tmp_path: Path) -> None:
    port = str(free_port())
    jobs = [
        launch(
            "add_up",
            options=("-n", "1", "--nodes", "2", "--node-rank", str(node), "--master-port", port),
            folder=tmp_path / f"node{node}",
        )
        for node in range(2)
    ]
    assert [job.ended() for job in jobs] == [0, 0], [job.stderr for job in jobs]
    assert [(tmp_path / "ranks" / f"sum-{rank}").read_text() for rank in range(2)] == ["3.0", "3.0"]
    assert [jobs[0].words[rank]["LOCAL_RANK"] for rank in range(2)] == ["0", "0"]
    assert {jobs[0].words[rank]["MASTER_PORT"] for rank in range(2)} == {port}
    assert [job.stdout for job in jobs] == ["output of rank 0\n", ""]


@pytest.fixture
def cluster(tmp_path: Path, launch: Launch) -> Launch:
    """`cluster(behaviour, *words)`: multinode.sh with two hosts that a script instead of ssh takes for this one."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nhost=$1\nshift\necho "$host" >> "$(dirname "$0")/hosts"\nexec /bin/sh -c "$*"\n')
    ssh.chmod(0o755)
    (tmp_path / "hostfile").write_text("# two\nfirst slots=1\nsecond slots=1\n")
    port = str(free_port())
    options = (tmp_path / "hostfile", "--ssh", ssh, "--master-addr", "127.0.0.1", "--master-port", port)

    def start(behaviour: str, *words: str) -> Job:
        return launch(behaviour, *words, script=(ROOT / "launch" / "multinode.sh",), options=options)

    return start


def test_a_hostfile_starts_every_node(cluster: Launch, tmp_path: Path) -> None:
    words = ["a=[1,2]", "b='$HOME \"x\"'"]
    job = cluster("add_up", *words)
    assert job.ended() == 0, job.stderr
    assert sorted((tmp_path / "hosts").read_text().split()) == ["first", "second"]
    assert [job.words[rank]["words"] for rank in range(2)] == [words, words]
    assert [job.words[rank]["cwd"] for rank in range(2)] == [str(tmp_path)] * 2
    assert (tmp_path / "ranks" / "sum-1").read_text() == "3.0"
    assert job.stdout == "output of rank 0\n"


def test_a_failure_on_one_node_ends_the_other(cluster: Launch) -> None:
    job = cluster("second_finds_something")
    job.started()
    assert job.ended() == 2
    assert job.stderr == "heretic-ds: the disk of rank 1 is full\n"


def test_ctrl_c_reaches_rank_0_on_its_node(cluster: Launch) -> None:
    job = cluster("stop_when_asked")
    job.started()
    time.sleep(1)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.ended() == 0
    assert job.stdout == "output of rank 0\nrank 0 stopped\n"


def test_nodes_do_not_outlive_whoever_started_them(cluster: Launch) -> None:
    job = cluster("hang_on")
    job.started()
    job.process.kill()
    job.ended()


# The real command


def test_a_wrong_override_is_found_before_any_rank_starts(tmp_path: Path) -> None:
    job = Job(tmp_path, RUN, "-n", "2", "model", "search.trails=3")
    try:
        assert job.ended() == 2
        assert job.stderr.startswith("heretic-ds: there is no setting search.trails; did you mean search.trials?")
        assert job.stderr.count("\n") == 1
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        job.close()


def test_a_missing_model_is_one_line_from_all_ranks_together(tmp_path: Path) -> None:
    job = Job(tmp_path, RUN, "-n", "2", tmp_path / "nowhere", "prompts=demo")
    try:
        assert job.ended() == 2
        assert job.stderr.startswith("heretic-ds: ") and "nowhere" in job.stderr
        assert job.stderr.count("\n") == 1
        assert not (tmp_path / "runs").exists()
    finally:
        job.close()
