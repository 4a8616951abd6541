"""Ends a run again and again, at random moments in every stage, and compares it with one that was left alone.

Needs: nothing but the package; the model is the built-in demo model, on the CPU. A kill takes some 3 s of one core, on
two ranks some 40 s. Adds a part to ``benchmarks/results/kill_and_resume.json``, or replaces the one of that name. Ends
with status 1 where a number differs, something was lost, or a process was left behind.

    python benchmarks/kill_and_resume.py [--placement NAME] [--ranks N] [--kills 20] [--minutes N] [--trials 9]
        [--seed N]

A round is a run folder that is killed once in each stage, in order, a random while after the stage has begun, and at
last left alone. Then its trials, its choice and every exported file have to be those of the run that was never ended.
What a kill may do is looked at after each: the trials that were told of are in the journal, the export is whole or not
there, no process of the command is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import told_command
from figures import keep, machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = HERE / "results" / "kill_and_resume.json"
PLACEMENTS = {
    "replicated": ("capture=replicated", "evaluate=replicated"),
    "zero3, tensor_parallel": ("capture=zero3", "evaluate=tensor_parallel"),
    "fsdp": ("capture=fsdp", "evaluate=fsdp"),
    "pipeline": ("capture=pipeline", "evaluate=pipeline"),
}
"""By name, how the model lies while directions are captured and while edits are evaluated."""
AIMS = (
    "start", "opening", "loading", "response prefix", "capture", "the original's scores", "search", "search", "search",
    "verification", "export", "after export",
)  # fmt: skip
"""The stages in which a round is killed, in their order."""
GONE_SECONDS = 60.0
"""Within which nothing of a command may be left."""
_UNSURE = 1.3
"""How much longer than in the run that was left alone a stage may be waited in."""
_LONGEST = 600.0


@dataclass
class Kill:
    """One end that somebody else made."""

    round: int
    aimed_at: str
    stage: str
    """What the command was at: the last that it told."""
    signal: str
    victim: str
    status: int
    seconds: float
    """From the command's start."""
    trials_before: int
    trials_after: int
    gone_after: float
    """Seconds from the kill until no process of the command was left."""
    complaint: str
    """What was lost; empty as a rule."""


class Forked:
    """A copy of this process, which has the libraries loaded, at work on one command in a session of its own."""

    def __init__(self, words: Sequence[str], folder: Path, output: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.setsid()
                os.chdir(folder)
                handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for number in (1, 2):
                    os.dup2(handle, number)
                status = told_command.run(words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        """Its status as :class:`subprocess.Popen` has it; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = _LONGEST) -> int:
        """The status, once there is one. Raises as :class:`subprocess.Popen` does."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("heretic-ds", timeout)
            time.sleep(0.002)
        return status


class Command:
    """The command under way, with every process that belongs to it.

    A command of one process is mostly a copy of this one, which has loaded the libraries: what a kill meets there is
    the run itself, and not seconds of imports. With ``fresh`` it is started as people start it, and with ranks always.
    """

    def __init__(self, folder: Path, ranks: int, words: Sequence[str], fresh: bool = False) -> None:
        self.folder = folder
        self.told, self.output = (folder.parent / f"{folder.name}.{kind}" for kind in ("told", "output"))
        self.told.unlink(missing_ok=True)
        words = [*words, f"run.dir={folder}"]
        own = {"TOLD": str(self.told), "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
        self.process: Forked | subprocess.Popen[bytes]
        if ranks == 1 and not fresh:
            os.environ.update(own)
            self.process = Forked(words, folder.parent, self.output)
        else:
            launcher = [] if ranks == 1 else ["heretic_ds.launching", "-n", str(ranks), "--module"]
            with self.output.open("wb") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", *launcher, "told_command", *words],
                    cwd=folder.parent,
                    env=os.environ | own | {"DS_ACCELERATOR": "cpu"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        self.began = time.monotonic()

    def stages(self) -> list[tuple[float, str]]:
        """What was told so far: moments and stages."""
        lines = self.told.read_text().splitlines() if self.told.exists() else []
        return [(float(moment), stage) for moment, _, stage in (line.partition(" ") for line in lines)]

    def processes(self) -> list[psutil.Process]:
        """Every process of this command that still runs."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                ours = os.getsid(process.pid) == self.process.pid or process.environ().get("TOLD") == str(self.told)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process | None:
        """The process that is this rank, where it runs already."""
        for process in self.processes():
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(number) and "told_command" in process.cmdline():
                    return process
        return None

    def wait_for(self, stage: str) -> None:
        """Until the stage has begun, or is over, or the command has ended."""
        deadline = time.monotonic() + _LONGEST
        while self.process.poll() is None and time.monotonic() < deadline:
            if any(told == stage for _, told in self.stages()):
                return
            time.sleep(0.001)

    def wait_until_gone(self) -> float:
        """Seconds until nothing of it is left; what is left after GONE_SECONDS is killed, and a minute more told."""
        began = time.monotonic()
        while self.processes() and time.monotonic() - began < GONE_SECONDS:
            self.process.poll()
            time.sleep(0.02)
        gone = time.monotonic() - began
        for process in self.processes():
            gone = 2 * GONE_SECONDS
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        return round(gone, 2)

    def finish(self) -> None:
        """Wait for a command that nobody ends."""
        if self.process.wait(_LONGEST) != 0:
            raise SystemExit(f"the command ended with {self.process.returncode}:\n{self.output.read_text()}")


class Reference:
    """The run that was left alone: what others have to come to, and how long its stages took."""

    def __init__(self, place: Path, ranks: int, words: Sequence[str]) -> None:
        self.folder = place / "alone"
        command = Command(self.folder, ranks, words)
        command.finish()
        told = command.stages()
        ends = [moment for moment, _ in told[1:]] + [time.monotonic()]
        self.durations: Counter[str] = Counter()
        for (moment, stage), end in zip(told, ends, strict=True):
            self.durations[stage] = max(self.durations[stage], end - moment)
        self.outcome, self.files = outcome_of(self.folder), digests(self.folder / "model")

    def differences(self, folder: Path) -> list[str]:
        """Names of what differs in another run folder, times aside."""
        found, outcome, files = [], outcome_of(folder), digests(folder / "model")
        for key, value in self.outcome.items():
            if key == "trials":
                pairs = zip(value, outcome[key], strict=False)
                found += [f"trial {ours['index']}" for ours, theirs in pairs if ours != theirs]
            if key != "trials" and outcome[key] != value:
                found.append(key)
        if len(outcome["trials"]) != len(self.outcome["trials"]):
            found.append("number of trials")
        found += [name for name in sorted({*files, *self.files}) if files.get(name) != self.files.get(name)]
        left = [*folder.glob(".*.tmp"), *folder.glob(".model.*")]
        return found + [f"{file.name} was left" for file in left]


def outcome_of(folder: Path) -> dict[str, Any]:
    """What of a run's results has to repeat."""
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results[key] for key in ("baseline", "pareto", "selected", "verified", "examples", "response_prefix")}
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in results["trials"]]
    return {**kept, "trials": trials}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every exported file, but for card and manifest, which bear a date."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in ("README.md", "heretic_ds.json")
    }


def finished_trials(folder: Path) -> int:
    """Trials that the journal holds in whole lines."""
    journal = folder / "study.journal"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return sum(b'"kl":' in line for line in lines)


def lost(command: Command, before: int) -> str:
    """What a kill has lost or left half done; empty where nothing."""
    folder, after = command.folder, finished_trials(command.folder)
    told = len(re.findall(r"\(\d+ of \d+ done", command.output.read_text(errors="replace")))
    if after < before + told:
        return f"{told} trials were told of and {before} were there, but the journal holds {after}"
    for name in ("results.json", "measured.json", "fingerprint.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())
    if (folder / "model").exists():
        manifest = json.loads((folder / "model" / "heretic_ds.json").read_text())
        if manifest["files"] != digests(folder / "model"):
            return "the export is not whole"
    return ""


def end(command: Command, ranks: int, numbers: random.Random) -> tuple[str, str]:
    """End the command in one of many ways; what was sent, and to whom."""
    ways = [("SIGKILL", "everything")] * 2 + [("SIGTERM", "everything"), ("SIGINT", "twice"), ("SIGINT", "once")]
    if ranks > 1:
        ways = [("SIGKILL", "everything"), ("SIGTERM", "supervisor"), ("SIGKILL", "supervisor"), ("SIGINT", "twice")]
        ways += [("SIGINT", "once"), *((name, f"rank {n}") for name in ("SIGKILL", "SIGTERM") for n in range(ranks))]
    name, victim = numbers.choice(ways)
    number, own = signal.Signals[name], psutil.Process(command.process.pid)
    with suppress(psutil.Error):
        if victim == "everything":
            for process in command.processes():
                with suppress(psutil.Error):
                    process.send_signal(number)
        elif victim.startswith("rank"):
            rank = command.rank(int(victim.split()[1]))
            victim = victim if rank else "supervisor"
            (rank or own).send_signal(number)
        else:
            own.send_signal(number)
        if victim == "twice":
            time.sleep(numbers.uniform(0, 1))
            own.send_signal(number)
    return name, victim


def kill_once(
    folder: Path, aim: str, ranks: int, words: Sequence[str], alone: Reference, numbers: random.Random
) -> Kill:
    """Start the command, and end it a random while after a stage has begun."""
    before = finished_trials(folder)
    command = Command(folder, ranks, words, fresh=aim == "start")
    command.wait_for(aim)
    longest = _UNSURE * max(alone.durations[aim], 0.02)
    if aim == "search":  # of what is left of it the first half: more kills are to hit it
        longest *= (1 - before / len(alone.outcome["trials"])) / 2
    pause = numbers.uniform(0, longest)
    with suppress(subprocess.TimeoutExpired):
        command.process.wait(pause)
    stage = (command.stages() or [(0.0, "before the start")])[-1][1]
    if command.process.poll() is None:
        name, victim = end(command, ranks, numbers)
        with suppress(subprocess.TimeoutExpired):
            command.process.wait(_LONGEST if victim == "once" else GONE_SECONDS)
    else:
        name, victim = "none", "nobody"
    gone, ended = command.wait_until_gone(), time.monotonic() - command.began
    complaint = lost(command, before)
    if name == "none" and command.process.returncode != 0:
        complaint = complaint or f"it ended by itself: {command.output.read_text()[-300:]}"
    return Kill(
        0, aim, stage, name, victim, command.process.returncode, round(ended, 2), before, finished_trials(folder), gone,
        complaint or ("processes were left" if gone > GONE_SECONDS else ""),
    )  # fmt: skip


def load_libraries() -> None:
    """What commands of one process find loaded, with as many threads as those that are started anew."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import matplotlib.backends.backend_agg  # noqa: F401
    import optuna  # noqa: F401

    import heretic_ds.pipeline  # noqa: F401
    from heretic_ds.search import study  # noqa: F401

    told_command.telling_of_work()


def part_of(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Rounds until there were as many kills as asked for."""
    words = [
        "experiment=demo", *PLACEMENTS[options.placement], f"search.trials={options.trials}", "model.device=cpu",
        "search.startup_trials=4", "search.trials_per_pass=3", "generation.batch_size=16", "run.interactive=false",
        *(f"prompts.{kind}.{part}.slice=0:16" for kind in ("target", "baseline") for part in ("train", "eval")),
    ]  # fmt: skip
    numbers, began = random.Random(options.seed), time.monotonic()
    alone = Reference(place, options.ranks, words)
    kills: list[Kill] = []
    different: list[str] = []
    rounds = 0

    def enough() -> bool:
        over = options.minutes is not None and time.monotonic() - began > 60 * options.minutes
        return over or sum(kill.signal != "none" for kill in kills) >= options.kills

    while not enough():
        folder = place / f"round{rounds}"
        for aim in AIMS:
            if enough():
                break
            kills.append(kill_once(folder, aim, options.ranks, words, alone, numbers))
            kills[-1].round = rounds
            print(f"kill {len(kills)}: {asdict(kills[-1])}", flush=True)
            if kills[-1].signal == "none":  # it came to its end, and nothing is left to be killed
                break
        Command(folder, options.ranks, words).finish()
        found = alone.differences(folder)
        different += [f"round {rounds}: {name}" for name in found]
        print(f"round {rounds}: differences: {', '.join(found) or 'none'}", flush=True)
        rounds += 1
    return {
        "placement": options.placement,
        "ranks": options.ranks,
        "seed": options.seed,
        "trials": options.trials,
        "rounds": rounds,
        "minutes": round((time.monotonic() - began) / 60, 1),
        **told_of(kills),
        "differences": different,
        "columns": list(asdict(kills[0])),
        "kills": [list(asdict(kill).values()) for kill in kills],
        "machine": machine(),
    }


def told_of(kills: Sequence[Kill]) -> dict[str, Any]:
    """What all kills of a part come to."""
    hit = [kill for kill in kills if kill.signal != "none"]
    return {
        "kills_that_hit": len(hit),
        "by_stage": dict(Counter(kill.stage for kill in hit)),
        "by_signal": dict(Counter(f"{kill.signal}, {kill.victim}" for kill in hit)),
        "lost": [kill.complaint for kill in kills if kill.complaint],
        "longest_until_gone": max((kill.gone_after for kill in hit), default=0.0),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--placement", choices=PLACEMENTS, default="replicated")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, help="begin no more kills after so long")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and theirs, would ignore it
    if options.ranks == 1:
        load_libraries()
    with tempfile.TemporaryDirectory() as place:
        part = part_of(options, Path(place))
    earlier = json.loads(options.result.read_text()) if options.result.exists() else {}
    name = f"{options.placement} on {options.ranks}"
    parts = {**earlier.get("parts", {}), name: part}
    keep(options.result, {**earlier, "what": __doc__.splitlines()[0], "parts": parts})
    print(
        f"{part['kills_that_hit']} kills in {part['rounds']} rounds, {part['minutes']} min; differences: "
        f"{', '.join(part['differences']) or 'none'}; lost: {'; '.join(part['lost']) or 'nothing'}"
    )
    return 1 if part["differences"] or part["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
