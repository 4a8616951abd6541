"""The run folder: one process, one set of settings, files that are whole or absent."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from heretic_ds import run_folder
from heretic_ds.errors import UserError
from heretic_ds.foreign.disk import write_atomically
from heretic_ds.report.console import EarlierMessages
from heretic_ds.run_folder import RunFolder, finished_results

HELD = {"model.path": "a/model", "search.seed": 0}


def opened(path: Path, held: dict[str, Any] | None = None) -> RunFolder:
    return RunFolder.open(path, "task: {}\n", HELD if held is None else held)


def start(code: str, argument: Path, stdout: int | None = None) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(Path(run_folder.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code, str(argument)], stdout=stdout, env=env)


def files_below(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_creates_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    with opened(path) as folder:
        assert folder.config.read_text() == "task: {}\n"
        assert folder.load_results() is None
    with RunFolder.open(path, "task: {name: abliterate}\n", HELD) as folder:
        assert folder.config.read_text() == "task: {name: abliterate}\n"


def test_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from heretic_ds.run_folder import RunFolder\n"
        f"folder = RunFolder.open(Path(sys.argv[1]), '', {HELD!r}); print('open', flush=True); time.sleep(60)"
    )
    child = start(code, tmp_path / "run", stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match=rf"{tmp_path / 'run'} is in use by another process \(pid {child.pid}\)"):
            opened(tmp_path / "run")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with opened(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_a_disk_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, blocking: bool) -> bool:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_folder, "lock_descriptor", refuse)
    with pytest.raises(UserError, match=r"offers no file locks \(Function not implemented\); set run.dir"):
        opened(tmp_path / "run")


def test_one_process_cannot_open_it_twice_either(tmp_path: Path) -> None:
    with opened(tmp_path / "run"), pytest.raises(UserError, match=f"pid {os.getpid()}"):
        opened(tmp_path / "run")
    opened(tmp_path / "run").close()


def test_other_settings_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    opened(tmp_path / "run").close()
    before = files_below(tmp_path)
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "run", {"model.path": "another/model", "search.seed": 0, "prompts.system": None})
    message = str(caught.value)
    assert 'model.path was "a/model", is now "another/model"' in message
    assert "search.seed" not in message and "run.dir" in message and "\n" not in message
    assert files_below(tmp_path) == before
    with pytest.raises(UserError, match=r"search.seed was 0, is now 1"):
        opened(tmp_path / "run", HELD | {"search.seed": 1})


def test_someone_elses_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not a run folder and not empty \(it holds notes.txt\)"):
        opened(tmp_path)
    assert files_below(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(UserError, match="is a file, not a folder"):
        opened(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "notes.txt" / "run")


def test_empty_and_half_opened_folders_are_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".fingerprint.json.abc.tmp").write_text("{")
    (tmp_path / "config.yaml").write_text("")
    opened(tmp_path).close()
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == HELD


def test_a_new_folder_can_be_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    folder = opened(path)
    folder.remember(response_prefix="")
    folder.discard()
    assert list(tmp_path.iterdir()) == []
    opened(path).close()
    opened(path).discard()  # it was there before
    assert (path / "config.yaml").is_file()
    folder = opened(tmp_path / "runs" / "other")
    (folder.path / "model").mkdir()
    folder.discard()
    assert (folder.path / "config.yaml").is_file() and path.is_dir()


def test_directions_outlive_a_new_folder_that_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    folder = opened(path)
    folder.remember(response_prefix="")
    folder.directions.write_bytes(b"hours of work")
    folder.discard()
    assert files_below(tmp_path) == {"runs/model/directions.safetensors": b"hours of work"}
    folder = opened(path, HELD | {"search.seed": 1})  # and with other settings, which made the mistake
    assert folder.measured == {}
    folder.discard()
    assert files_below(tmp_path) == {"runs/model/directions.safetensors": b"hours of work"}


def test_benchmarks_may_come_before_the_run_and_outlive_it(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    path.mkdir(parents=True)
    (path / "benchmark.json").write_text("{}")
    folder = opened(path)
    folder.remember(response_prefix="")
    folder.discard()
    assert files_below(tmp_path) == {"runs/model/benchmark.json": b"{}"}


def test_results_are_whole_or_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "run") as folder:
        folder.save_results({"schema": 1, "trials": []}, finished={"trials": 4, "export": "x"})
        with pytest.raises(ValueError):
            folder.save_results({"kl": float("nan")})

        def power_cut(source: str, target: str) -> None:
            raise OSError("cut")

        monkeypatch.setattr(run_folder.os, "replace", power_cut)
        with pytest.raises(UserError, match=r"cannot be written \(cut\)"):
            folder.save_results({"schema": 2})
        monkeypatch.undo()
        assert folder.load_results() == {"schema": 1, "trials": [], "finished": {"trials": 4, "export": "x"}}
        assert not list(folder.path.glob("*.tmp")) and not list(folder.path.glob(".*.tmp"))
        folder.save_results({"schema": 1})
        folder.results.write_text("{")
        with pytest.raises(UserError, match="cannot be read as JSON"):
            folder.load_results()


def test_a_finished_folder_is_known_without_opening_it(tmp_path: Path) -> None:
    path, request = tmp_path / "run", {"trials": 4}
    assert finished_results(path, HELD, request) is None
    with opened(path) as folder:
        folder.save_results({"schema": 1})
        assert finished_results(path, HELD, request) is None
        folder.save_results({"schema": 1}, finished=request)
        found = finished_results(path, HELD, request)
        assert found is not None and found["schema"] == 1
        assert finished_results(path, HELD, {"trials": 5}) is None
        assert finished_results(path, HELD | {"search.seed": 3}, request) is None
    with opened(tmp_path / "other", HELD | {"ablation.rank": 3}) as folder:  # a setting that is not told where it is 1
        folder.save_results({"schema": 1}, finished=request)
        assert finished_results(folder.path, HELD, request) is None


def test_results_are_never_seen_half_written(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from heretic_ds.foreign.disk import write_atomically\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1; write_atomically(Path(sys.argv[1]), str(number) * 200000)\n"
    )
    target = tmp_path / "results.json"
    child = start(code, target)
    deadline = time.monotonic() + 30
    while not target.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    text = target.read_text()
    number = text[: len(text) // 200000]
    assert number and text == number * 200000


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_measured_values_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as folder:
        folder.remember(batch_size={"capture": 48}, trials_per_pass=4)
        folder.remember(trials_per_pass=8)
    with opened(tmp_path / "run") as folder:
        assert folder.measured == {"batch_size": {"capture": 48}, "trials_per_pass": 8}


def test_what_is_known_already_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = run_folder.write_atomically
    monkeypatch.setattr(run_folder, "write_atomically", lambda path, data: written.append(path) or write(path, data))
    with opened(tmp_path / "run") as folder:
        written.clear()
        for values in ({"batch_size": {"kl": 7}}, {"batch_size": {"kl": 7}}, {"batch_size": {"kl": 8}}):
            folder.remember(**values)
        assert len(written) == 2 and folder.measured == {"batch_size": {"kl": 8}}


def test_every_trial_of_the_results_has_a_line(tmp_path: Path) -> None:
    results = {
        "versions": {"torch": "2"}, "trials": [{"index": 0, "kl": 0.5}, {"index": 1, "text": "a\nb"}],
        "front": [0, 1], "none": None, "empty": [],
    }  # fmt: skip
    with opened(tmp_path / "run") as folder:
        folder.save_results(results)
        assert folder.load_results() == results
        lines = folder.results.read_text().splitlines()
    assert [line.strip() for line in lines if "index" in line] == [
        '{"index": 0, "kl": 0.5},', '{"index": 1, "text": "a\\nb"}',
    ]  # fmt: skip
    assert len(lines) == 10 and ' "front": [0, 1],' in lines


def test_the_log_begins_with_what_was_said_before(tmp_path: Path) -> None:
    logger = logging.getLogger("heretic_ds_test_earlier")
    logger.setLevel(logging.INFO)
    with EarlierMessages(logger) as earlier:
        logger.getChild("part").warning("%s it", "before")
        with opened(tmp_path / "run") as folder:
            folder.attach_log(logger, earlier=earlier.records)
            earlier.end()
            logger.info("within it")
            assert earlier.records == []
    assert logger.handlers == []
    lines = [line.split(" ", 2)[2] for line in folder.log.read_text().splitlines()]
    assert lines == [f"WARNING {logger.name}.part: before it", f"INFO {logger.name}: within it"]


def test_log_is_appended_and_let_go(tmp_path: Path) -> None:
    logger = logging.getLogger("heretic_ds_test_log")
    logger.setLevel(logging.INFO)
    for word in ("first", "second"):
        with opened(tmp_path / "run") as folder:
            folder.attach_log(logger)
            logger.getChild("part").info("%s run", word)
        logger.info("outside")
        assert logger.handlers == []
    lines = folder.log.read_text().splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["first run", "second run"]


def test_what_a_kill_left_of_a_file_is_removed(tmp_path: Path) -> None:
    """And nothing else that is hidden."""
    with RunFolder.open(tmp_path / "run", "config", {"a": 1}) as folder:
        folder.save_results({"trials": []})
    for name in (".results.json.abcd_123.tmp", ".measured.json.zzzzzzzz.tmp", ".mine.tmp", ".mine"):
        (tmp_path / "run" / name).write_text("half")
    with RunFolder.open(tmp_path / "run", "config", {"a": 1}):
        hidden = {file.name for file in (tmp_path / "run").glob(".*")}
    assert hidden == {".lock", ".mine.tmp", ".mine"}
    assert (tmp_path / "run" / "results.json").is_file()


def test_links_that_a_killed_optuna_leaves_are_no_way_out(tmp_path: Path) -> None:
    """Of either journal; any other link is refused."""
    with opened(tmp_path / "run"):
        pass
    for journal in ("study.journal", "screening.journal"):
        (tmp_path / "run" / f"{journal}.lock").symlink_to(tmp_path / "run" / journal)
    with opened(tmp_path / "run"):
        pass
    (tmp_path / "run" / "other.journal.lock").symlink_to(tmp_path / "run" / "study.journal")
    with pytest.raises(UserError, match=r"other\.journal\.lock, which is a link"), opened(tmp_path / "run"):
        pass
