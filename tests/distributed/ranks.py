"""Real ranks for tests: processes with gloo between them, started once and handed one function after another.

A call that takes too long, or in which a rank fails or dies, ends every process of every rank, and shows what the
failing rank said. The next call starts new ranks: forks of one process that has imported what they need, because the
imports take several seconds of every rank.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent

_PRELOADED = [
    "pytest", "deepspeed", "tests.distributed.engines", "tests.distributed.expert_parallel_ranks",
    "tests.distributed.fsdp_ranks", "tests.distributed.geometry_ranks", "tests.distributed.memory_ranks",
    "tests.distributed.output_edits_ranks", "tests.distributed.pipeline_ranks", "tests.distributed.zero3_ranks",
]  # fmt: skip
_START_SECONDS = 120
_LAST_WORDS_SECONDS = 3
"""How long the other ranks may still report after one has failed: often the cause is theirs."""


class RankFailed(AssertionError):
    """A rank raised, died or took too long; the message holds what it said."""


class Ranks:
    """A world of `size` processes on this machine, for calls of module-level functions `work(world, **arguments)`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder: Path | None = None
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Connection] = []

    def run(self, work: Callable[..., Any], timeout: float = 120, **arguments: Any) -> list[Any]:
        """What `work` returned on each rank, by rank. Raises RankFailed, with all ranks ended, where one failed."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that died is found below, with its output
                _send(connection, (work.__module__, work.__qualname__, arguments))
        return self._collect(work.__qualname__, timeout)

    def close(self) -> None:
        """End every process of every rank, whatever they started included."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        with Listener(str(self._folder / "socket"), family="AF_UNIX", backlog=self.size) as listener:
            for rank in range(self.size):
                arguments = (str(self._folder), rank, self.size)
                self._processes.append(fork_server().Process(target=serve, args=arguments, daemon=True))
                self._processes[-1].start()
            accepted = {}
            listener._listener._socket.settimeout(_START_SECONDS)  # type: ignore[attr-defined]
            for _ in range(self.size):
                try:
                    connection = listener.accept()
                except OSError as error:
                    self._fail(f"ranks did not start within {_START_SECONDS} s", range(self.size), error)
                accepted[pickle.loads(connection.recv_bytes())] = connection
        self._connections = [accepted[rank] for rank in range(self.size)]

    def _collect(self, name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        problems: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(problems) < self.size:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in results and rank not in problems]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                try:
                    done, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    done, value = False, f"the process ended with status {self._status(rank)}"
                (results if done else problems)[rank] = value
                if not done:
                    deadline = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS)
        silent = [rank for rank in range(self.size) if rank not in results and rank not in problems]
        if problems:
            text = "\n".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items()))
            self._fail(f"{name} failed\n{text}", problems)
        if silent:
            self._fail(f"{name} took longer than {timeout:g} s on ranks {silent}", silent)
        return [results[rank] for rank in range(self.size)]

    def _status(self, rank: int) -> int | None:
        self._processes[rank].join()
        return self._processes[rank].exitcode

    def _fail(self, message: str, ranks: Any, cause: BaseException | None = None) -> None:
        output = ""
        for rank in ranks:
            log = Path(self._folder or ".") / f"rank{rank}.log"
            if log.exists():
                output += f"\n--- last output of rank {rank}\n{log.read_text(errors='replace')[-3000:]}"
        self.close()
        raise RankFailed(message + output) from cause


def _send(connection: Connection, value: Any) -> None:
    """As plain bytes: what the connection would make of tensors shares memory, which outlives no rank."""
    connection.send_bytes(pickle.dumps(value))


@cache
def fork_server() -> ForkServerContext:
    """What starts ranks: a process that has imported what they will import, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()
    return context


def serve(folder: str, rank: int, size: int) -> None:
    """One rank: join the world, then run what is asked for until the connection ends."""
    from heretic_ds.world import World

    os.setsid()
    gc.freeze()  # engines collect garbage when they close; what was imported before is none
    with (Path(folder) / f"rank{rank}.log").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    with Client(str(Path(folder) / "socket"), family="AF_UNIX") as connection:
        _send(connection, int(os.environ["RANK"]))
        world = World.join(f"file://{folder}/store")
        while True:
            try:
                module, name, arguments = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                work = importlib.import_module(module)
                for part in name.split("."):
                    work = getattr(work, part)
                _send(connection, (True, work(world, **arguments)))
            except BaseException:
                _send(connection, (False, traceback.format_exc()))
