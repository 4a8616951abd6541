"""One node's ranks from their start to their end: none is left running, and the first cause of a failure is known."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from heretic_ds.launching import rank_guard
from heretic_ds.launching.plan import Launch, make_plan
from heretic_ds.launching.rank_guard import is_alive
from heretic_ds.launching.stopped import StoppedRanks, why_ended

_LOOK_SECONDS = 0.1
LAUNCHER_SECONDS = 10.0
"""What the launcher gets to end the other ranks by itself when one has failed."""
_TERM_SECONDS = 10.0
"""What processes get between SIGTERM and SIGKILL."""
_CAUSE_SECONDS = 0.5
"""A word this much older than a wordless death is not its consequence."""
_TAIL_LINES = 20


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: int
    """Exit status of the rank that failed first; 130 and 143 where the user ended it; 1 for a rank that was killed."""
    error: str | None = None
    """That rank's own words: one line where it is something the user can mend."""
    signal: int | None = None
    """The signal to this process that ended the job."""


@dataclass
class _Rank:
    number: int
    process: psutil.Process | None
    ended: float | None = None
    returned: int | None = None
    """Its status as a process, negative for a signal; None where it was not seen."""
    status: int | None = None
    """From its own word, like the following."""
    text: str = ""
    time: float = 0.0

    @property
    def consequence(self) -> int:
        """How likely another rank's end explains this one's, 0 to 2.

        Nobody here sends SIGKILL first; a status of its own may come from a connection that broke; SIGTERM is what the
        launcher sends to all that are left.
        """
        if self.returned == -signal.SIGTERM:
            return 2
        return 0 if self.returned is not None and self.returned < 0 else 1

    @property
    def failed(self) -> bool:
        wordless_end = self.ended is not None and self.status is None and self.returned != 0
        return self.status not in (None, 0) or wordless_end


class Supervised(ABC):
    """A job that is being watched over: the ranks of one node, or all nodes.

    `interrupt` and `end` may be called from signal handlers and other threads while `run` runs.
    """

    _interrupts = 0
    _ending_signal: int | None = None

    def interrupt(self) -> None:
        """What Ctrl-C means: the first is for rank 0, which may end its search with what there is; the second ends."""
        self._interrupts += 1

    def end(self, number: int = signal.SIGTERM) -> None:
        """End every rank, as the named signal to this process would."""
        self._ending_signal = self._ending_signal or number

    @abstractmethod
    def run(self) -> Outcome:
        """Start the ranks and return when none of them is left. Raises UserError where they cannot be started."""


class Supervisor(Supervised):
    """Starts one node's ranks and watches over them."""

    def __init__(self, launch: Launch, on_failure: Callable[[], None] = lambda: None) -> None:
        self._launch = launch
        self._on_failure = on_failure
        self._ranks: dict[int, _Rank] = {}
        self._stopped = StoppedRanks()
        self._given_up: int | None = None
        """The rank for whose being stopped all are ended."""
        self._logs_matter = False

    def run(self) -> Outcome:
        folder = Path(tempfile.mkdtemp(prefix="heretic_ds_ranks_"))
        try:
            plan = make_plan(self._launch, folder)
            process = subprocess.Popen(
                plan.command,
                env=plan.environment | {rank_guard.FOLDER: str(folder)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C would make the launcher end everything
                preexec_fn=rank_guard.die_with_parent,
            )
            try:
                self._watch(process, folder)
            finally:
                _end_group(process)
            self._look(folder)
            return self._outcome(process.returncode, folder)
        finally:
            if not self._logs_matter:
                shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        """Until the launcher has ended, or somebody has to end it."""
        forwarded, failed_since = 0, None
        while process.poll() is None and self._ending_signal is None:
            self._look(folder)
            if self._interrupts > forwarded:
                forwarded = self._interrupts
                self._forward_interrupt()
            if failed_since is None and any(rank.failed for rank in self._ranks.values()):
                failed_since = time.monotonic()
                self._on_failure()
            if failed_since is not None and time.monotonic() - failed_since > LAUNCHER_SECONDS:
                return
            living = {n: rank.process for n, rank in self._ranks.items() if rank.process and rank.ended is None}
            self._given_up = self._stopped.look(living, elsewhere=self._launch.nodes > 1)
            if self._given_up is not None:
                return
            time.sleep(_LOOK_SECONDS)

    def _forward_interrupt(self) -> None:
        decider = self._ranks.get(0)
        if self._interrupts == 1 and decider is not None and decider.ended is None and decider.process is not None:
            decider.process.send_signal(signal.SIGINT)
        else:
            self.end(signal.SIGINT)

    def _look(self, folder: Path) -> None:
        """Take in which ranks live, and what they have left word of."""
        for file in folder.glob("rank-*.json"):
            number = int(file.stem.removeprefix("rank-"))
            words = json.loads(file.read_text(encoding="utf-8"))
            rank = self._ranks.setdefault(number, _Rank(number, _process(words["pid"])))
            if "status" in words:
                rank.status, rank.text, rank.time = words["status"], words["text"], words["time"]
        now = time.time()  # ranks that ended between two looks have no order of their own
        for rank in self._ranks.values():
            if rank.ended is None and (rank.process is None or not is_alive(rank.process)):
                rank.ended = now
                rank.returned = None if rank.process is None else _returned(rank.process.pid)

    def _outcome(self, launcher_status: int, folder: Path) -> Outcome:
        if self._ending_signal is not None:
            return ended_by(self._ending_signal)
        if self._given_up is not None:
            return Outcome(1, why_ended(self._given_up))
        cause = self._first_cause()
        if cause is None and self._ranks and launcher_status == 0:
            return Outcome(0)
        if cause is None:
            when = "" if self._ranks else " before any rank ran"
            return Outcome(1, f"heretic-ds: DeepSpeed's launcher ended with status {launcher_status}{when}")
        if cause.status is not None and cause.text.startswith("heretic-ds: "):
            return Outcome(cause.status, cause.text)
        self._logs_matter = any(folder.glob("rank-*.log"))
        more = f" (the output of ranks above 0 is in {folder})" if self._logs_matter else ""
        if cause.status is not None and cause.text:
            alone = len(self._ranks) == 1 and self._launch.nodes == 1
            return Outcome(cause.status, cause.text if alone else f"rank {cause.number} failed{more}:\n{cause.text}")
        tail = _tail(folder / f"rank-{cause.number}.log")
        returned = cause.returned if cause.status is None else cause.status
        if returned is None:
            returned = _as_returned(launcher_status)
        told = f"heretic-ds: rank {cause.number} {_how(returned)}{more}"
        return Outcome(returned if 0 < returned < 128 else 1, "\n".join([*tail, told]))

    def _first_cause(self) -> _Rank | None:
        """The rank that failed by itself; the others fail as its consequence, or are ended by the launcher.

        The launcher ends ranks only after one has ended. So the first to be gone without a word was not ended by the
        launcher, unless a word from another rank is so much older that this one may have died of that rank's leaving.
        Ranks that ended between two looks are told apart by `_Rank.consequence`.
        """
        failed = [rank for rank in self._ranks.values() if rank.failed]
        spoken = min((rank for rank in failed if rank.status is not None), key=lambda rank: rank.time, default=None)
        gone = min(
            (rank for rank in failed if rank.ended is not None),
            key=lambda rank: (rank.ended or 0.0, rank.consequence),
            default=None,
        )
        if spoken is None or gone is None:
            return spoken or gone
        died_alone = gone.status is None and spoken.time > (gone.ended or 0.0) - _CAUSE_SECONDS
        return gone if died_alone else spoken


@contextmanager
def signals_to(supervisor: Supervised) -> Iterator[None]:
    """While the context lasts, signals to this process end the ranks as they should instead of this process alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            supervisor.interrupt()
        else:
            supervisor.end(number)

    caught = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        caught.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def supervise(job: Supervised) -> int:
    """Run a job to its end, signals to this process included, and say how it ended. Returns its exit status."""
    with signals_to(job):
        outcome = job.run()
    sys.stdout.flush()
    if outcome.error:
        print(outcome.error, file=sys.stderr)
    return outcome.status


def ended_by(number: int) -> Outcome:
    """The outcome of a job that was ended by a signal to its supervisor."""
    told = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return Outcome(128 + number, f"heretic-ds: {told}", number)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _returned(pid: int) -> int | None:
    """The status of a process that has ended and that its parent has not yet waited for; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == "Z" else None


def _as_returned(launcher_status: int) -> int:
    """A rank's status from that of the launcher, which gives the status of one failed rank, modulo 256."""
    return launcher_status - 256 if launcher_status >= 256 - signal.NSIG else launcher_status


def _how(returned: int) -> str:
    """How a rank ended that left no word."""
    if returned >= 0:
        return f"ended with status {returned}"
    try:
        name = signal.Signals(-returned).name
    except ValueError:
        name = "unknown"
    oom = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by signal {-returned} ({name}){oom}"


def _tail(log: Path) -> list[str]:
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the process group that `leader` was started to lead."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _TERM_SECONDS
        with suppress(ProcessLookupError):  # the last one has just ended
            if _any_left(leader):
                os.killpg(leader.pid, number)
        while _any_left(leader) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)


def _any_left(leader: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the group still runs."""
    if leader.poll() is None:
        return True
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader.pid and is_alive(process):
                return True
    return False
