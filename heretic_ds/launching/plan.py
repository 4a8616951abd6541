"""What is to be started: how many ranks, where, with which command line and environment."""

from __future__ import annotations

import glob
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from heretic_ds.errors import UserError
from heretic_ds.needs import check_deepspeed

DEFAULT_PORT = 29500
"""Where ranks on several nodes meet, unless told otherwise: the launcher's own default."""

_RUNNER = "from deepspeed.launcher.runner import main; main()"
_HERE = "127.0.0.1"
_NO_HOSTFILE = os.devnull  # else the launcher looks for one in a place of its own


@dataclass(frozen=True)
class Launch:
    """One node's part in one job."""

    arguments: tuple[str, ...] = ()
    """For every rank, as on the command line of heretic-ds."""
    ranks: int | None = None
    """On this node; None: one for every GPU, 1 without GPUs."""
    nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    """Where rank 0 is; None: here, or the first host of a hostfile."""
    master_port: int | None = None
    """None: a free one, on one node; DEFAULT_PORT on several."""
    options: tuple[str, ...] = ()
    """More options for `deepspeed`."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables for every rank beside those of this process."""
    module: str = "heretic_ds"

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise UserError(f"-n {self.ranks}: a node takes 1 rank or more")
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes}: a job takes 1 node or more")
        if not 0 <= self.node_rank < self.nodes:
            raise UserError(f"--node-rank {self.node_rank} is not below --nodes {self.nodes}; nodes count from 0")
        if self.nodes > 1 and self.ranks is None:
            raise UserError(f"--nodes {self.nodes} needs -n, the number of ranks on every node")
        stray = [option for option in self.options[:1] if not option.startswith("-")]
        if stray:
            raise UserError(f"{stray[0]!r} is not an option of deepspeed; options start with a dash")


@dataclass(frozen=True)
class Plan:
    """The process to start: DeepSpeed's launcher, which starts this node's ranks."""

    command: list[str]
    environment: dict[str, str]


def make_plan(launch: Launch, folder: Path) -> Plan:
    """The launcher's command and environment; a hostfile that it needs is written to `folder`. Raises UserError."""
    check_deepspeed("starting ranks")
    environment = {**os.environ, **launch.env}
    devices = gpus(environment)
    count = launch.ranks or len(devices) or 1
    if devices and count > len(devices):
        raise UserError(
            f"{count} ranks on {len(devices)} GPUs; give -n {len(devices)} at most, or set DS_ACCELERATOR=cpu for "
            "ranks without GPUs"
        )
    port = launch.master_port or (free_port() if launch.nodes == 1 else DEFAULT_PORT)
    command = [sys.executable, "-c", _RUNNER, "--master_port", str(port)]
    command += _places(launch, devices[:count], count, folder)
    if not {"-q", "--quiet", "--log_level"} & {option.split("=")[0] for option in launch.options}:
        command += ["--log_level", "critical"]  # how ranks end is told by them and by us
    command += [*launch.options, "--no_local_rank", "--module", launch.module, *launch.arguments]
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher sets it for the devices that it is told to use
    if not devices:
        _prepare_cpu(environment, count)
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():  # a checkout, which need not be installed and need not be the folder
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return Plan(command, environment)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _places(launch: Launch, devices: list[int], count: int, folder: Path) -> list[str]:
    own = devices or list(range(count))
    as_counted = own == list(range(count))
    if launch.nodes == 1:
        where = ["--num_gpus", str(count)] if as_counted else ["--include", f"localhost:{_listed(own)}"]
        return ["--hostfile", _NO_HOSTFILE, *where]
    names = [f"node{number}" for number in range(launch.nodes)]  # only their order counts: every node starts its own
    slots = {name: list(range(count)) for name in names} | {names[launch.node_rank]: own}
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots={max(slots[name]) + 1}\n" for name in names), encoding="utf-8")
    chosen = "@".join(f"{name}:{_listed(slots[name])}" for name in names)
    return [
        *("--hostfile", str(hostfile), "--include", chosen),
        *("--no_ssh", "--node_rank", str(launch.node_rank), "--master_addr", launch.master_addr or _HERE),
    ]


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def gpus(environment: Mapping[str, str]) -> list[int]:
    """GPUs that the job may use. Found without importing torch; where there is doubt DeepSpeed decides."""
    if environment.get("DS_ACCELERATOR", "cuda") != "cuda":
        return []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        nodes = (re.fullmatch(r"/dev/nvidia(\d+)", path) for path in glob.glob("/dev/nvidia*"))
        return list(range(sum(node is not None for node in nodes)))
    words = [word.strip() for word in chosen.split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={chosen}: DeepSpeed's launcher takes numbers of GPUs only, as in "
            "CUDA_VISIBLE_DEVICES=0,1; for a part of a GPU run heretic-ds without a launcher"
        )
    return [int(word) for word in words]


def _prepare_cpu(environment: dict[str, str], count: int) -> None:
    """Ranks that share the cores of this machine; each would otherwise take all of them."""
    if environment.setdefault("DS_ACCELERATOR", "cpu") == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // count, 1)))
