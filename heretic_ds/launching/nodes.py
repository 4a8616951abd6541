"""A job on several nodes: one supervisor on each, started over ssh and tied to this process by a pipe.

The pipe carries the job's description to the node, then a line every few seconds. When the lines stop, or the pipe
closes, the node ends its ranks: nothing is left behind where this process, the network or a node goes away.
What a node reports comes back among its output, on lines that start with MARK.
"""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, cast

from heretic_ds.errors import UserError
from heretic_ds.foreign.reading import read_text
from heretic_ds.foreign.text import in_one_line
from heretic_ds.launching.plan import Launch
from heretic_ds.launching.supervisor import LAUNCHER_SECONDS, Outcome, Supervised, Supervisor, ended_by, signals_to

MARK = "\x1eheretic_ds "
SSH = "ssh -T -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 45.0
"""Without a line for so long a node takes the other end for dead."""
_PARTING_SECONDS = 40.0
"""What nodes get to end their ranks before the connection to them is ended."""
_LOOK_SECONDS = 0.1
_HOSTFILE_LIMIT = 2**20
_HOST = re.compile(
    r"([A-Za-z_][\w.-]{0,63}@)?(?=.{1,253}\Z)"
    r"([A-Za-z0-9][\w-]*(\.[A-Za-z0-9][\w-]*)*\.?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(%\w+)?)",
    re.ASCII,
)
"""A name or an address, with a user or without: nothing that ssh takes for an option, a shell for more."""
_FORWARDED = re.compile(r"(HF|TORCH|NCCL|GLOO|DS|UCX|OMP|MKL|TOKENIZERS|TRITON|PYTORCH)_\w+|PYTHONPATH|LD_LIBRARY_PATH")
"""Variables of this process that the ranks on every node get."""


def read_hostfile(file: Path, limit: int | None = None) -> dict[str, int]:
    """Hosts, in order, with the ranks that each takes (`name slots=8`). Raises UserError."""
    lines = read_text(file, _HOSTFILE_LIMIT, "see launch/hostfile.example").split("\n")
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        content = line.split("#")[0].strip()
        if not content:
            continue
        entry = re.fullmatch(r"(\S+)\s+slots=([1-9]\d{0,5})", content)
        if entry is None or not _HOST.fullmatch(entry[1]):
            found = in_one_line(repr(content), 120)
            raise UserError(f"{file}, line {number}: found {found}, expected a line like: node1 slots=8")
        if entry[1] in hosts:
            raise UserError(f"{file}, line {number}: {entry[1]} is listed twice")
        hosts[entry[1]] = int(entry[2])
    if not hosts:
        raise UserError(f"the hostfile {file} names no host; see launch/hostfile.example")
    if limit is not None and not 1 <= limit <= len(hosts):
        raise UserError(f"--nodes {limit}: {file} lists {len(hosts)} hosts")
    return dict(list(hosts.items())[:limit])


class Cluster(Supervised):
    """The whole job of several nodes. The first host has rank 0; the outcome is that of the node that failed first."""

    def __init__(self, launch: Launch, hosts: Mapping[str, int], ssh: str = SSH) -> None:
        counts = {launch.ranks} if launch.ranks else set(hosts.values())
        if len(counts) > 1:
            raise UserError(f"the hostfile gives {sorted(counts)} slots; every node takes equally many: add -n")
        first = next(iter(hosts))
        address = launch.master_addr or (socket.gethostname() if _is_here(first) else first)
        self._launch = replace(launch, ranks=counts.pop(), nodes=len(hosts), master_addr=address)
        self._hosts = list(hosts)
        self._ssh = shlex.split(ssh)

    def run(self) -> Outcome:
        nodes = [_Node(host, rank, self._launch, self._ssh) for rank, host in enumerate(self._hosts)]
        try:
            self._watch(nodes)
        finally:
            for node in nodes:
                node.part()
            deadline = time.monotonic() + _PARTING_SECONDS
            for node in nodes:
                node.wait(max(deadline - time.monotonic(), 0.0))
        if self._ending_signal is not None:
            return ended_by(self._ending_signal)
        failed = [node for node in nodes if node.outcome.status != 0]
        return min(failed, key=lambda node: node.failed_at).outcome if failed else Outcome(0)

    def _watch(self, nodes: list[_Node]) -> None:
        forwarded, failed_since, beat = 0, None, 0.0
        while any(node.running for node in nodes) and self._ending_signal is None:
            if self._interrupts > forwarded:
                forwarded = self._interrupts
                if forwarded > 1 or not nodes[0].running:
                    self.end(signal.SIGINT)
                nodes[0].send("interrupt")
            if time.monotonic() - beat > _BEAT_SECONDS:
                beat = time.monotonic()
                for node in nodes:
                    node.send("going on")
            if failed_since is None and any(node.failing for node in nodes):
                failed_since = time.monotonic()
            if failed_since is not None and time.monotonic() - failed_since > LAUNCHER_SECONDS:
                return
            time.sleep(_LOOK_SECONDS)


class _Node:
    """The connection to one node's supervisor."""

    def __init__(self, host: str, rank: int, launch: Launch, ssh: Sequence[str]) -> None:
        self.host = host
        self.failed_at = float("inf")
        self._outcome: Outcome | None = None
        python = [sys.executable, "-m", "heretic_ds.launching", "--as-node"]
        root = str(Path(__file__).resolve().parents[2])
        local = _is_here(host)
        remote = f"cd {shlex.quote(root)} && exec {shlex.join(python)}"
        self._process = subprocess.Popen(
            python if local else [*ssh, host, remote],
            cwd=root if local else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._to, self._from = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        forwarded = {name: value for name, value in os.environ.items() if _FORWARDED.fullmatch(name)}
        description = asdict(replace(launch, node_rank=rank, env={**forwarded, **launch.env}))
        self.send(json.dumps({"folder": os.getcwd(), "launch": description}))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def failing(self) -> bool:
        if not self.running and self._process.returncode != 0:
            self.failed_at = min(self.failed_at, time.monotonic())
        return self.failed_at < float("inf")

    @property
    def outcome(self) -> Outcome:
        if self._outcome is not None:
            return self._outcome
        status = self._process.returncode
        if status == 0:
            return Outcome(0)
        return Outcome(1, f"heretic-ds: the connection to {self.host} ended with status {status}, without a word")

    def send(self, line: str) -> None:
        """Tell the node something; one that is gone tells so by its exit status."""
        with suppress(OSError, ValueError):
            self._to.write(line + "\n")
            self._to.flush()

    def part(self) -> None:
        """Close the pipe, which makes the node end what still runs there."""
        with suppress(OSError):
            self._to.close()

    def wait(self, seconds: float) -> None:
        """Wait for the node's end; after that time end the connection."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(_BEAT_SECONDS)

    def _read(self) -> None:
        for line in self._from:
            if not line.startswith(MARK):
                sys.stdout.write(line)
                sys.stdout.flush()
                continue
            report = json.loads(line.removeprefix(MARK))
            if report["status"] != 0:
                self.failed_at = min(self.failed_at, time.monotonic())
            if not report["failing"]:
                self._outcome = Outcome(report["status"], report["error"])


def _is_here(host: str) -> bool:
    return host in {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}


def serve() -> int:
    """The other end of the pipe, on the node: run what the first line describes. Returns the exit status."""
    lines = _lines()
    description = json.loads(next(lines, "null"))
    if description is None:
        return 1
    launch = description["launch"]
    launch = Launch(**launch | {name: tuple(launch[name]) for name in ("arguments", "options")})
    if not os.path.isdir(description["folder"]):
        raise UserError(f"{socket.gethostname()} has no folder {description['folder']}; every node needs the same")
    os.chdir(description["folder"])
    supervisor = Supervisor(launch, on_failure=lambda: _report(1, None, failing=True))
    threading.Thread(target=_listen, args=(lines, supervisor), daemon=True).start()
    with signals_to(supervisor):
        outcome = supervisor.run()
    _report(outcome.status, outcome.error, failing=False)
    return outcome.status


def _listen(lines: Iterator[str], supervisor: Supervisor) -> None:
    for line in lines:
        if line == "interrupt":
            supervisor.interrupt()
    supervisor.end()


def _lines() -> Iterator[str]:
    """Lines of standard input, until it ends or is silent for too long."""
    rest = b""
    while select.select([0], [], [], _SILENCE_SECONDS)[0]:
        received = os.read(0, 65536)
        if not received:
            return
        *lines, rest = (rest + received).split(b"\n")
        yield from (line.decode() for line in lines)


def _report(status: int, error: str | None, failing: bool) -> None:
    with suppress(OSError):  # nobody listens any more
        print(MARK + json.dumps({"status": status, "error": error, "failing": failing}), flush=True)
