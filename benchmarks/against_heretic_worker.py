"""How a tool's process is spoken to: one line of JSON in, one line of JSON out, each with what it took.

Standard library alone, since two environments use it. What a tool prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handlers = dict[str, Callable[..., Any]]


def peak_bytes() -> int:
    """Most memory that this process has had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def processor_seconds() -> float:
    """User and system time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def serve(handlers: Handlers) -> None:
    """Answer requests ``{"do": name, ...}`` until the input ends; a request that fails is answered with its error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        clock, processor = time.perf_counter(), processor_seconds()
        try:
            reply = {"result": handlers[request.pop("do")](**request)}
        except Exception as error:  # the other side says it, with which request it was
            import traceback

            reply = {"error": repr(error), "trace": traceback.format_exc()}
        reply["seconds"] = time.perf_counter() - clock
        reply["processor_seconds"] = processor_seconds() - processor
        reply["peak_bytes"] = peak_bytes()
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Worker:
    """A tool in a process of its own, which computes only while it is being asked."""

    def __init__(self, python: Path, script: Path, threads: int, log: Path, folder: Path) -> None:
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
        }  # fmt: skip
        self.log = log
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(python.absolute()), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, env=environment, cwd=folder,
        )  # fmt: skip

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The reply to a request. Raises RuntimeError where the tool failed."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": "the process ended", "trace": ""}
        if "error" in reply:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"`{do}` failed: {reply['error']}\n{reply['trace']}\n{tail}")
        return reply

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
