"""What is left, and what is said, where work with vLLM's process is broken off; a stub is in place of vLLM."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from heretic_ds.ablation import Ablation, Edit
from heretic_ds.errors import SearchFailed
from heretic_ds.placements.vllm.engine import Limits, VllmEngine
from heretic_ds.placements.vllm.inside.passes import Divergences, Logits, Reader, References, Span
from heretic_ds.placements.vllm.inside.wire import Message
from heretic_ds.placements.vllm.server import Server
from heretic_ds.world import ALONE, World

ROOT = Path(__file__).parents[2]
STUB = '''#!{python}
"""Answers with the edit's direction; edit 9 fails half way, and `hang` tells something and works on."""
import socket, sys, time
sys.path.insert(0, {root!r})
import torch
from heretic_ds.placements.vllm.inside.wire import Channel, Hangup

channel, weights = Channel(socket.socket(fileno=int(sys.argv[-1]))), None
try:
    while True:
        message = channel.receive()
        if message.kind == "set_weights":
            edit = message.fields["edit"]
            if edit and edit["direction_index"] == 9.0:
                weights = "half edited"
                channel.send("failed", error="it broke", memory=False)
                continue
            weights = edit and edit["direction_index"]
        elif message.kind == "hang":
            channel.send("told")
            time.sleep(message.fields["seconds"])
        fields = {{"prepare": {{"obstacle": "none can be"}}, "digest": {{"ranks": [str(weights)]}}}}
        channel.send("done", answer=message.fields.get("answer"), **fields.get(message.kind, {{}}))
except Hangup:
    pass
'''


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose process is a stub."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, root=str(ROOT)))
    stub.chmod(0o755)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started = Server(str(stub), {})
    yield started
    started.close()


def refused(server: Server) -> bool:
    """Whether it says that its process is gone, and that has left no trace."""
    with pytest.raises(SearchFailed, match=r"vLLM was interrupted in the middle .*; run the same command again"):
        server.ask("echo", answer=3)
    return server.process.poll() is not None and not server.log.parent.exists()


def test_an_exchange_that_is_broken_off_is_the_last(server: Server) -> None:
    """Else every later answer would be that to the command before."""

    def fail(message: Message) -> None:
        raise ValueError("a scorer's mistake")

    assert server.ask("echo", answer=1).fields["answer"] == 1
    with pytest.raises(ValueError, match="a scorer's mistake"):
        server.ask("hang", told=fail, seconds=0.1, answer=2)
    assert refused(server) and refused(server)


def test_a_second_interrupt_leaves_no_process(server: Server) -> None:
    """Ctrl-C in a pass, and again while its process is given time to end."""

    def twice(message: Message) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.ask("hang", told=twice, seconds=60)
    assert server.process.poll() == -signal.SIGKILL and refused(server)


def test_weights_that_an_edit_has_half_changed_are_brought_back(server: Server) -> None:
    limits = Limits(frozenset({2}), 4, 100, 8)
    engine = VllmEngine(World(), ALONE, server, torch.float32, limits)
    engine.prepare(Ablation(torch.eye(3, 4, dtype=torch.float64), "none", False))
    engine.apply(Edit(1.0, {}))
    assert engine.digests() == ["1.0"]
    engine.restore()
    with pytest.raises(SearchFailed, match="it broke"):
        engine.apply(Edit(9.0, {}))
    assert engine.digests() == ["half edited"]
    engine.restore()
    assert engine.digests() == ["None"]


def test_places_that_are_computed_twice_count_once() -> None:
    """As of a row that vLLM has put off for want of memory, wherever it is cut into passes."""

    class Head:
        def compute_logits(self, logits_BV: Tensor) -> Tensor:
            return logits_BV

    vocabulary, length, count = 8, 6, 4
    original_KV, edited_KV = torch.randn(2, length, vocabulary, generator=torch.Generator().manual_seed(5))
    what = (Head(), vocabulary, [length], [count])

    def taken(reader: Reader, *passes: range) -> list[tuple[int, int, bytes]]:
        found = []
        for each in passes:
            reader.read([Span(0, 0, each.start, len(each))], edited_KV[each.start : each.stop])
            found += reader.taken()
        return found

    references = References(*what)
    references.read([Span(0, 0, 0, length)], original_KV)
    for reader in (partial(Divergences, *what, references=references), partial(Logits, *what)):
        whole = taken(reader(), range(length))
        assert len(whole) == 1
        assert taken(reader(), range(4), range(4, 6)) == whole
        assert taken(reader(), range(4), range(4), range(4, 6)) == whole
        assert taken(reader(), range(3, 5), range(3), range(3, 6)) == whole


def test_references_last_as_long_as_what_is_compared_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the job and in the worker, which has to keep a vocabulary for each place."""
    inside = "heretic_ds.placements.vllm.inside"
    writers = SimpleNamespace(VllmEditor=None, find_writers=None, keep_weights=lambda: None, sum_over_ranks=None)
    monkeypatch.setitem(sys.modules, f"{inside}.writers", writers)  # imports vLLM
    monkeypatch.delitem(sys.modules, f"{inside}.extension", raising=False)
    extension = importlib.import_module(f"{inside}.extension")
    monkeypatch.delitem(sys.modules, f"{inside}.extension")
    config = SimpleNamespace(get_vocab_size=lambda: 8)
    resident = extension.Resident(SimpleNamespace(execute_model=None, get_model=lambda: None, model_config=config))

    class Asked:
        """Has the worker begin what a server is asked for."""

        def ask(self, command: str, *tensors: Tensor, **fields: Any) -> Message:
            kind = {"remember": "references", "divergences": "divergences"}[command]
            reading = {"kind": kind, "lengths": [2], "counts": [1], "forget": fields.get("forget", [])}
            resident.begin([], {**reading, "name": fields["name"]})
            return Message("done", {}, [torch.zeros(1, 1)])

    limits = Limits(frozenset({2}), 4, 100, 8)
    engine = VllmEngine(World(), ALONE, Asked(), torch.float32, limits)  # type: ignore[arg-type]
    first, second = engine.divergence_from_now([[1, 2]]), engine.divergence_from_now([[3, 4]])
    assert len(resident._references) == 2 and first([None]) == second([None]) == [[0.0]]
    del first
    third = engine.divergence_from_now([[5, 6]])
    assert len(resident._references) == 2 and second([None]) == third([None]) == [[0.0]]


def test_a_process_that_does_not_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        Server(str(tmp_path / "nowhere"), {})
    assert list(tmp_path.iterdir()) == []


OWN = """#!{python}
# Runs what vLLM's process runs, with a stub in place of the module that imports vLLM.
import runpy, sys, time, types

class Serving:
    def __init__(self, channel):
        self.channel = channel

    def echo(self, message):
        return {{}}

    def hang(self, message):
        self.channel.send("told")
        time.sleep(600)

    def close(self):
        pass

sys.modules["heretic_vllm.serving"] = types.SimpleNamespace(Serving=Serving)
sys.argv = sys.argv[-3:]
runpy.run_module("heretic_vllm", run_name="__main__")
"""
KILLED = """
import os, sys
from heretic_ds.placements.vllm.server import Server
waits, works = Server(sys.argv[1], {}), Server(sys.argv[1], {})
waits.ask("echo")
print(waits.process.pid, works.process.pid, flush=True)
works.ask("hang", told=lambda message: os.kill(os.getpid(), 9))
"""


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked for its status has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_job_leaves_neither_processes_nor_folders(tmp_path: Path) -> None:
    """Whether vLLM's process waits for a command or is at work."""
    python, temporary = tmp_path / "python", tmp_path / "temporary"
    python.write_text(OWN.format(python=sys.executable))
    python.chmod(0o755)
    temporary.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(python)],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL
    left, patience = [int(pid) for pid in ended.stdout.split()], time.monotonic() + 30
    assert len(left) == 2
    while (any(map(runs, left)) or any(temporary.iterdir())) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not any(map(runs, left)) and list(temporary.iterdir()) == []
